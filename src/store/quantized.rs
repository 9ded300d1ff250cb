//! Weights as the run holds them: NF4 or as stored, decided by module name, and counted.

use std::collections::BTreeSet;
use std::fmt;

use crate::config::{AdapterKind, TrainConfig};
use crate::error::{Error, Result};
use crate::store::Weight;
use crate::store::checkpoint::{Checkpoint, release};
use crate::store::nf4::{self, Nf4Matrix};
use crate::tensor::{DType, Tensor};

/// Modules that become NF4 unless `quantize_modules` says otherwise. What is not here stays as stored: routers and
/// gates, `in_proj_ba`, convolutions, norms, embedding and head.
const DEFAULT_MODULES: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj_qkvz",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// Which modules become NF4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizePolicy {
    /// Module name suffixes, on path-component borders.
    modules: Vec<String>,
    /// Whether the user named them: then each must name something.
    named: bool,
    /// Quantise the scales too.
    double_quant: bool,
}

impl QuantizePolicy {
    /// The policy of `config`: nothing for `adapter: lora`.
    pub fn new(config: &TrainConfig) -> Self {
        let double_quant = config.bnb_4bit_use_double_quant;
        match (config.adapter, &config.quantize_modules) {
            (AdapterKind::Lora, _) => Self::none(),
            (AdapterKind::Qlora, Some(modules)) => Self::modules(modules.clone(), double_quant),
            (AdapterKind::Qlora, None) => Self::defaults(double_quant),
        }
    }

    /// Nothing is quantised.
    pub fn none() -> Self {
        Self {
            modules: Vec::new(),
            named: false,
            double_quant: false,
        }
    }

    /// The default modules.
    pub fn defaults(double_quant: bool) -> Self {
        Self {
            modules: DEFAULT_MODULES.map(str::to_owned).to_vec(),
            named: false,
            double_quant,
        }
    }

    /// These modules, each of which must name something.
    pub fn modules(modules: Vec<String>, double_quant: bool) -> Self {
        Self {
            modules,
            named: true,
            double_quant,
        }
    }

    /// Whether `module` becomes NF4.
    pub fn quantizes(&self, module: &str) -> bool {
        self.matching(module).is_some()
    }

    /// Whether scales become 8 bits too.
    pub fn double_quant(&self) -> bool {
        self.double_quant
    }

    /// Index of the entry that names `module`.
    fn matching(&self, module: &str) -> Option<usize> {
        self.modules.iter().position(|suffix| {
            let head = module.strip_suffix(suffix.as_str());
            head.is_some_and(|head| head.is_empty() || head.ends_with('.'))
        })
    }
}

/// How many weights are held how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightCounts {
    /// NF4 matrices.
    pub num_nf4: usize,
    /// Bytes of their codes and scales.
    pub nf4_bytes: usize,
    /// Tensors as stored.
    pub num_dense: usize,
    /// Their bytes.
    pub dense_bytes: usize,
}

impl fmt::Display for WeightCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        write!(
            f,
            "{} matrices in 4 bits ({:.1} MB), {} tensors as stored ({:.1} MB)",
            self.num_nf4,
            megabytes(self.nf4_bytes),
            self.num_dense,
            megabytes(self.dense_bytes)
        )
    }
}

/// Where the elements come from.
#[derive(Debug)]
enum Source {
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// Nowhere: names and shapes are checked against a checkpoint.
    Survey(Checkpoint),
    /// Nowhere: every shape that is asked for is there, stored as this.
    Shapes(DType),
}

/// Hands out the weights of a checkpoint, quantising on the way. Nothing is held twice: a dense weight is a view of the
/// mapped file, and of a quantised one only codes and scales stay.
#[derive(Debug)]
pub struct QuantizedStore {
    source: Source,
    policy: QuantizePolicy,
    matched: Vec<bool>,
    asked: BTreeSet<String>,
    counts: WeightCounts,
}

impl QuantizedStore {
    /// Weights of `checkpoint` under `policy`.
    pub fn new(checkpoint: Checkpoint, policy: QuantizePolicy) -> Self {
        Self::of(Source::Checkpoint(checkpoint), policy)
    }

    /// The same, without reading a weight: names, shapes and policy are checked, weights counted. What is handed out has a
    /// shape and no elements.
    pub fn survey(checkpoint: Checkpoint, policy: QuantizePolicy) -> Self {
        Self::of(Source::Survey(checkpoint), policy)
    }

    /// Any weight that is asked for, stored as `dtype`, without elements: for what a config alone tells.
    pub fn shapes(dtype: DType, policy: QuantizePolicy) -> Self {
        Self::of(Source::Shapes(dtype), policy)
    }

    fn of(source: Source, policy: QuantizePolicy) -> Self {
        let matched = vec![false; policy.modules.len()];
        Self {
            source,
            policy,
            matched,
            asked: BTreeSet::new(),
            counts: WeightCounts::default(),
        }
    }

    fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.source {
            Source::Checkpoint(checkpoint) | Source::Survey(checkpoint) => Some(checkpoint),
            Source::Shapes(_) => None,
        }
    }

    fn stored(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match &self.source {
            Source::Checkpoint(checkpoint) => {
                self.asked.insert(name.to_owned());
                checkpoint.tensor(name, shape)
            }
            Source::Survey(checkpoint) => {
                self.asked.insert(name.to_owned());
                checkpoint.planned(name, shape)
            }
            Source::Shapes(dtype) => Ok(Tensor::planned(name, shape, *dtype)),
        }
    }

    /// Matrix `name` (`....weight`), NF4 if the policy names its module.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`] and of the quantisation.
    pub fn matrix(
        &mut self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight> {
        let tensor = self.stored(name, &[out_features, in_features])?;
        self.hold(name, tensor)
    }

    /// Small tensor `name`, widened to f32.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`].
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.stored(name, shape)?;
        self.counts.num_dense += 1;
        self.counts.dense_bytes += tensor.len() * DType::F32.size();
        if tensor.is_planned() {
            return Ok(Tensor::planned(name, shape, DType::F32));
        }
        Tensor::from_f32(name, shape, tensor.to_f32_vec()?)
    }

    /// Gate, up and down matrices of the experts under `prefix`, one tensor each on disk or fused into
    /// `gate_up_proj [E, 2 I, D]` (gate rows first) and `down_proj [E, D, I]`. Each expert's matrix is quantised by itself,
    /// so both layouts give the same codes.
    ///
    /// # Errors
    /// Those of [`Self::matrix`].
    pub fn experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        intermediate_size: usize,
        hidden_size: usize,
    ) -> Result<[Vec<Weight>; 3]> {
        let (width, hidden) = (intermediate_size, hidden_size);
        let (mut gate, mut up, mut down) = (Vec::new(), Vec::new(), Vec::new());
        let fused = format!("{prefix}.gate_up_proj");
        if self.checkpoint().is_some_and(|it| it.contains(&fused)) {
            let gate_up = self.stored(&fused, &[num_experts, 2 * width, hidden])?;
            let gate_up = gate_up.reshaped(&[num_experts * 2 * width, hidden])?;
            let downs = format!("{prefix}.down_proj");
            let downs = self.stored(&downs, &[num_experts, hidden, width])?;
            let downs = downs.reshaped(&[num_experts * hidden, width])?;
            for expert in 0..num_experts {
                let name = |projection: &str| format!("{prefix}.{expert}.{projection}.weight");
                let first = 2 * expert * width;
                let part = gate_up.outer(name("gate_proj"), first..first + width)?;
                gate.push(self.hold(&name("gate_proj"), part)?);
                let part = gate_up.outer(name("up_proj"), first + width..first + 2 * width)?;
                up.push(self.hold(&name("up_proj"), part)?);
                let part =
                    downs.outer(name("down_proj"), expert * hidden..(expert + 1) * hidden)?;
                down.push(self.hold(&name("down_proj"), part)?);
            }
        } else {
            for expert in 0..num_experts {
                let name = |projection: &str| format!("{prefix}.{expert}.{projection}.weight");
                gate.push(self.matrix(&name("gate_proj"), width, hidden)?);
                up.push(self.matrix(&name("up_proj"), width, hidden)?);
                down.push(self.matrix(&name("down_proj"), hidden, width)?);
            }
        }
        Ok([gate, up, down])
    }

    fn hold(&mut self, name: &str, tensor: Tensor) -> Result<Weight> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let Some(entry) = self.policy.matching(module) else {
            self.counts.num_dense += 1;
            self.counts.dense_bytes += tensor.num_bytes();
            return Ok(Weight::Dense(tensor));
        };
        if matches!(module, "model.embed_tokens" | "lm_head") {
            return Err(policy_error(
                &self.policy.modules[entry],
                "embedding and head stay as stored",
            ));
        }
        self.matched[entry] = true;
        self.counts.num_nf4 += 1;
        self.counts.nf4_bytes += nf4::num_bytes(tensor.len(), self.policy.double_quant);
        if tensor.is_planned()
            && let &[out_features, in_features] = tensor.shape()
        {
            let dims = [out_features, in_features];
            let matrix = Nf4Matrix::planned(name, dims, self.policy.double_quant);
            return Ok(Weight::Nf4(matrix));
        }
        let matrix = Nf4Matrix::from_tensor(&tensor, self.policy.double_quant)?;
        release(&tensor);
        Ok(Weight::Nf4(matrix))
    }

    /// Checks, once the model is loaded, that every module the user named for NF4 was found, and that the model used every
    /// tensor of the checkpoint: one it does not know is a feature it would silently leave out.
    ///
    /// # Errors
    /// [`Error::Config`] naming an entry of `quantize_modules` that matched nothing; [`Error::Unsupported`] naming a tensor.
    pub fn verify(&self) -> Result<()> {
        let is_unused = |name: &&str| !self.asked.contains(*name) && !is_harmless(name);
        let names = self.checkpoint().into_iter().flat_map(Checkpoint::names);
        let unused: Vec<&str> = names.filter(is_unused).collect();
        if let [first, rest @ ..] = &unused[..] {
            let others = match rest.len() {
                0 => String::new(),
                count => format!(" (and {count} more)"),
            };
            return Err(Error::Unsupported {
                what: format!("tensor `{first}`{others} of the checkpoint"),
                why: "the model that config.json describes has no use for it; training without it would give \
                      other results"
                    .to_owned(),
            });
        }
        let unmatched = self.matched.iter().position(|matched| !matched);
        match unmatched.filter(|_| self.policy.named) {
            Some(entry) => Err(policy_error(
                &self.policy.modules[entry],
                "no matrix of this model is called that; remove it",
            )),
            None => Ok(()),
        }
    }

    /// What was handed out so far.
    pub fn counts(&self) -> WeightCounts {
        self.counts
    }
}

/// Tensors that change nothing: a copy of the tied head, rotary tables, which are computed.
fn is_harmless(name: &str) -> bool {
    name == "lm_head.weight" || name.ends_with(".rotary_emb.inv_freq")
}

fn policy_error(entry: &str, reason: &str) -> Error {
    Error::Config {
        origin: "quantize_modules".to_owned(),
        reason: format!("`{entry}` cannot be quantised: {reason}"),
    }
}
