//! A merged Hugging Face checkpoint: `W + scaling B A` in the base's own files, names and element types.
//!
//! The base's weights as stored are merged, not their NF4 version: who runs the merged model runs it unquantised, or
//! quantises it again.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use fs_err as fs;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};

use super::{Adapter, narrowed};
use crate::data::tokenizer::FILES as TOKENIZER_FILES;
use crate::durable::{Durable, partial_of};
use crate::error::{Error, Result};
use crate::model::adapter::LoraModule;
use crate::store::checkpoint::{Checkpoint, map_file};

const OTHER_FILES: [&str; 3] = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
];

/// Writes the merged checkpoint to `dir`, which must not exist or be empty.
///
/// # Errors
/// [`Error::Config`] if `dir` holds something; [`Error::Format`] for a base that changed; those of the file system.
pub fn write(
    files: &Durable,
    dir: &Path,
    model_dir: &Path,
    adapter: &Adapter<'_>,
    chat_template: Option<&str>,
) -> Result<()> {
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        let reason = format!("`{}` is not empty; name a new directory", dir.display());
        return Err(Error::Config {
            origin: "--output".to_owned(),
            reason,
        });
    }
    let partial = partial_of(dir);
    let written = fill(&partial, model_dir, adapter, chat_template);
    let finished = written
        .and_then(|()| files.sync_dir(&partial))
        .and_then(|()| files.replace_dir(&partial, dir));
    if finished.is_err() {
        // A half of a model is of no use, and large.
        let _ = fs::remove_dir_all(&partial);
    }
    finished
}

/// Writes all files of the merged checkpoint into `out`.
fn fill(
    out: &Path,
    model_dir: &Path,
    adapter: &Adapter<'_>,
    chat_template: Option<&str>,
) -> Result<()> {
    fs::create_dir_all(out)?;
    let modules: HashMap<&str, &LoraModule> = adapter
        .layout
        .modules()
        .iter()
        .map(|module| (module.name.as_str(), module))
        .collect();
    let mut num_merged = 0;
    for shard in Checkpoint::open(model_dir)?.files() {
        num_merged += merge_shard(shard, out, adapter, &modules)?;
    }
    if num_merged != modules.len() {
        let reason = format!(
            "holds {num_merged} of the {} matrices the adapter changes",
            modules.len()
        );
        return Err(Error::format(model_dir, reason));
    }
    for name in OTHER_FILES.iter().chain(&TOKENIZER_FILES) {
        let source = model_dir.join(name);
        if source.is_file() {
            fs::copy(source, out.join(name))?;
        }
    }
    if let Some(template) = chat_template {
        fs::write(out.join("chat_template.jinja"), template)?;
    }
    for entry in fs::read_dir(out)? {
        fs::File::open(entry?.path())?.sync_all()?;
    }
    Ok(())
}

/// Copies a shard, its merged matrices replaced; how many those were.
fn merge_shard(
    path: &Path,
    out: &Path,
    adapter: &Adapter<'_>,
    modules: &HashMap<&str, &LoraModule>,
) -> Result<usize> {
    let map = map_file(path)?;
    let malformed = |error: safetensors::SafeTensorError| Error::format(path, error.to_string());
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(malformed)?;
    let tensors = SafeTensors::deserialize(&map).map_err(malformed)?;
    let mut num_merged = 0;
    let views: Vec<(String, Merged<'_>)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let updates = updates(&name, view.shape(), modules);
            num_merged += updates.len();
            let adapter = *adapter;
            (
                name,
                Merged {
                    view,
                    adapter,
                    updates,
                },
            )
        })
        .collect();
    let name = path.file_name().unwrap_or_default();
    let info = metadata.metadata().clone();
    safetensors::serialize_to_file(views, info, &out.join(name)).map_err(malformed)?;
    Ok(num_merged)
}

/// The modules that change tensor `name`, each with the first row it changes.
fn updates<'a>(
    name: &str,
    shape: &[usize],
    modules: &HashMap<&str, &'a LoraModule>,
) -> Vec<(usize, &'a LoraModule)> {
    let fused = [
        (".gate_up_proj", ["gate_proj", "up_proj"].as_slice()),
        (".down_proj", &["down_proj"]),
    ];
    if let Some(module) = name
        .strip_suffix(".weight")
        .and_then(|name| modules.get(name))
    {
        return vec![(0, *module)];
    }
    let Some((prefix, projections)) = fused
        .iter()
        .find_map(|(suffix, projections)| Some((name.strip_suffix(suffix)?, projections)))
        .filter(|(prefix, _)| prefix.ends_with(".experts") && shape.len() == 3)
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for expert in 0..shape[0] {
        for (part, projection) in projections.iter().enumerate() {
            let rows = shape[1] / projections.len();
            let module = modules.get(format!("{prefix}.{expert}.{projection}").as_str());
            found.extend(module.map(|module| (expert * shape[1] + part * rows, *module)));
        }
    }
    found
}

/// A tensor of the base with its updates, computed when it is written.
struct Merged<'a> {
    view: TensorView<'a>,
    adapter: Adapter<'a>,
    updates: Vec<(usize, &'a LoraModule)>,
}

impl View for Merged<'_> {
    fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.view.data();
        if self.updates.is_empty() {
            return Cow::Borrowed(bytes);
        }
        let Some(mut values) = super::adapter::widened(&self.view) else {
            return Cow::Borrowed(bytes);
        };
        for (first_row, module) in &self.updates {
            add_update(&mut values, *first_row, &self.adapter, module);
        }
        Cow::Owned(narrowed(&values, self.view.dtype()))
    }

    fn data_len(&self) -> usize {
        self.view.data().len()
    }
}

/// `values[first_row..] += scaling B A`, summed in f64.
fn add_update(values: &mut [f32], first_row: usize, adapter: &Adapter<'_>, module: &LoraModule) {
    let pair = &module.pair;
    let (a, b) = (
        &adapter.values[pair.a_range()],
        &adapter.values[pair.b_range()],
    );
    let columns = pair.in_features;
    let rows = values[first_row * columns..]
        .chunks_exact_mut(columns)
        .zip(b.chunks_exact(pair.rank));
    let mut sums = vec![0.0f64; columns];
    for (row, factors) in rows.take(pair.out_features) {
        sums.fill(0.0);
        for (factor, a_row) in factors.iter().zip(a.chunks_exact(columns)) {
            for (sum, value) in sums.iter_mut().zip(a_row) {
                *sum += f64::from(*factor) * f64::from(*value);
            }
        }
        for (value, sum) in row.iter_mut().zip(&sums) {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "rounded once, to the stored precision"
            )]
            let merged = (f64::from(*value) + f64::from(pair.scaling) * sum) as f32;
            *value = merged;
        }
    }
}
