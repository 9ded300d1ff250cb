//! Where a job's base model is found, that it is whole and the one asked for, and what a download needs.
#![cfg(feature = "worker")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod common;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use brightrun::store::checkpoint::Checkpoint;
use brightrun::worker::identity::{self, Identity, IdentityError};
use brightrun::worker::model::{Found, NotFound, Roots, resolve};
use brightrun::worker::wanted::{INDEX_FILE, RepoFile, Wanted, WantedError, free_bytes};
use common::{copy_model, rewrite_json};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const ID: &str = "mistralai/Mistral-7B-Instruct-v0.2";

/// Three volumes and a hub cache, all below one directory.
struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn roots(&self) -> Roots {
        Roots {
            model_path: None,
            volumes: ["volume", "workspace", "models"]
                .map(|name| self.path(name))
                .to_vec(),
            hub_cache: Some(self.path("home/hub")),
        }
    }

    /// A whole model at `name`.
    fn model(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        copy_model("mistral", &path);
        path
    }

    #[track_caller]
    fn found(&self) -> Found {
        resolve(ID, &self.roots()).unwrap()
    }

    /// Why nothing was found, for the only place there is.
    #[track_caller]
    fn reason(&self) -> String {
        let error = resolve(ID, &self.roots()).unwrap_err();
        let mut there = error.tried.iter().filter(|tried| tried.exists);
        let reason = there.next().unwrap().reason.clone();
        assert!(there.next().is_none(), "{error}");
        assert!(error.to_string().contains(&reason), "{error}");
        reason
    }
}

/// Cuts the weights in `dir` into shards of one tensor each, with an index; their names.
fn shard(dir: &Path) -> Vec<String> {
    let bytes = fs_err::read(dir.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<&str> = file.names();
    names.sort_unstable();
    let (mut map, mut shards) = (serde_json::Map::new(), Vec::new());
    for (at, name) in names.iter().enumerate() {
        let shard = format!("model-{:05}-of-{:05}.safetensors", at + 1, names.len());
        let view = file.tensor(name).unwrap();
        let own = TensorView::new(view.dtype(), view.shape().to_vec(), view.data()).unwrap();
        fs_err::write(
            dir.join(&shard),
            safetensors::serialize([(name, own)], None).unwrap(),
        )
        .unwrap();
        map.insert((*name).to_owned(), json!(shard));
        shards.push(shard);
    }
    fs_err::write(
        dir.join(INDEX_FILE),
        json!({"metadata": {}, "weight_map": map}).to_string(),
    )
    .unwrap();
    fs_err::remove_file(dir.join("model.safetensors")).unwrap();
    shards
}

const CACHED: &str = "huggingface-cache/hub/models--mistralai--Mistral-7B-Instruct-v0.2";

#[test]
fn each_place_is_found_and_the_first_one_wins() {
    let places = [
        "volume/models/Mistral-7B-Instruct-v0.2",
        "volume/models/mistralai/Mistral-7B-Instruct-v0.2",
        "volume/huggingface-cache/hub/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/aa",
        "volume/.cache/huggingface/hub/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/aa",
        "workspace/models/Mistral-7B-Instruct-v0.2",
        "workspace/.cache/huggingface/hub/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/aa",
        "models/models/Mistral-7B-Instruct-v0.2",
        "home/hub/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/aa",
    ];
    let all = Disks::new();
    for place in places.into_iter().rev() {
        let one = Disks::new();
        let dir = one.model(place);
        assert_eq!(one.found().dir, dir);
        // Those made later come first.
        let dir = all.model(place);
        let found = all.found();
        assert_eq!((found.dir, found.warnings.len()), (dir, 0));
    }
    let explicit = all.model("elsewhere/m");
    let roots = Roots {
        model_path: Some(explicit.clone()),
        ..all.roots()
    };
    let found = resolve(ID, &roots).unwrap();
    assert_eq!(found.dir, explicit);
    assert_eq!(found.num_files, 1);
    let bytes = fs_err::metadata(explicit.join("model.safetensors"))
        .unwrap()
        .len();
    assert_eq!(found.num_bytes, bytes);
}

#[test]
fn a_model_path_of_a_pod_is_found_on_the_serverless_mount() {
    let disks = Disks::new();
    let dir = disks.model("volume/own/m");
    let with = |path: &str| {
        let roots = Roots {
            model_path: Some(disks.path(path)),
            ..disks.roots()
        };
        resolve(ID, &roots)
    };
    assert_eq!(with("workspace/own/m").unwrap().dir, dir);
    let error = with("workspace/own/other").unwrap_err();
    let first = &error.tried[0];
    assert_eq!(
        (&first.path, first.reason.as_str()),
        (&disks.path("workspace/own/other"), "does not exist")
    );
    // A repository of the hub cache.
    let snapshot = disks.model(&format!("volume/own/{CACHED}/snapshots/abc"));
    assert_eq!(with(&format!("volume/own/{CACHED}")).unwrap().dir, snapshot);
}

#[test]
fn a_name_in_other_case_is_found() {
    for place in [
        "volume/models/mistral-7b-instruct-v0.2",
        "volume/models/MistralAI/Mistral-7B-instruct-v0.2",
        "workspace/huggingface-cache/hub/models--mistralai--mistral-7b-instruct-v0.2/snapshots/aa",
    ] {
        let disks = Disks::new();
        let dir = disks.model(place);
        assert_eq!(disks.found().dir, dir);
    }
}

#[test]
fn of_snapshots_the_named_one_comes_first_then_the_newest() {
    let disks = Disks::new();
    let repository = disks.path("volume").join(CACHED);
    let at = |name: &str| {
        disks
            .path("volume")
            .join(CACHED)
            .join("snapshots")
            .join(name)
    };
    for (name, seconds) in [("old", 1_000), ("new", 3_000), ("mid", 2_000)] {
        copy_model("mistral", &at(name));
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        fs_err::File::open(at(name))
            .unwrap()
            .file()
            .set_modified(time)
            .unwrap();
    }
    assert_eq!(disks.found().dir, at("new"));
    fs_err::create_dir_all(repository.join("refs")).unwrap();
    fs_err::write(repository.join("refs/main"), "old\n").unwrap();
    assert_eq!(disks.found().dir, at("old"));
    // What it names leads nowhere else.
    for hostile in ["../../../../../other", "/etc", ""] {
        disks.model("other");
        fs_err::write(repository.join("refs/main"), hostile).unwrap();
        assert_eq!(disks.found().dir, at("new"));
    }
    // One that is not whole gives way, and is told.
    fs_err::write(repository.join("refs/main"), "old").unwrap();
    fs_err::remove_file(at("old").join("tokenizer.json")).unwrap();
    let found = disks.found();
    assert_eq!(found.dir, at("new"));
    let warning = found.warnings.join("\n");
    assert!(
        warning.contains("snapshots/old: `tokenizer.json` is missing; "),
        "{warning}"
    );
}

#[test]
fn a_place_counts_only_when_it_is_whole() {
    let with = |change: &dyn Fn(&Path)| {
        let disks = Disks::new();
        let dir = disks.model("volume/models/Mistral-7B-Instruct-v0.2");
        change(&dir);
        disks.reason()
    };
    let remove =
        |name: &'static str| move |dir: &Path| fs_err::remove_file(dir.join(name)).unwrap();
    assert_eq!(with(&remove("config.json")), "`config.json` is missing");
    assert_eq!(
        with(&remove("tokenizer.json")),
        "`tokenizer.json` is missing"
    );
    assert!(with(&remove("model.safetensors")).contains("has no weights"));
    let pickled = with(&|dir| {
        fs_err::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap();
    });
    assert!(pickled.contains("which are not read"), "{pickled}");
    let half = with(&|dir| fs_err::write(dir.join("config.json"), "{\"model_ty").unwrap());
    assert!(
        half.contains("`config.json` is no JSON (10 bytes)"),
        "{half}"
    );
    let quantised = json!({"quantization_config": {"quant_method": "fp8"}}).to_string();
    let quantised = with(&|dir| fs_err::write(dir.join("config.json"), &quantised).unwrap());
    assert!(quantised.contains("quantised already (fp8)"), "{quantised}");
    let resize = |change: i64| {
        with(&move |dir: &Path| {
            let path = dir.join("model.safetensors");
            let len = fs_err::metadata(&path).unwrap().len();
            let file = fs_err::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(len.checked_add_signed(change).unwrap())
                .unwrap();
        })
    };
    let disks = Disks::new();
    let len = fs_err::metadata(disks.model("m").join("model.safetensors"))
        .unwrap()
        .len();
    let short = format!(
        "shard `model.safetensors` is truncated: {} bytes, expected {len}",
        len - 1
    );
    assert_eq!(resize(-1), short);
    assert!(resize(1).contains(&format!("is {} bytes, expected {len}", len + 1)));
    let almost_all = -i64::try_from(len).unwrap() + 20;
    assert!(resize(almost_all).contains("truncated: 20 bytes, expected a header of"));
    assert!(resize(almost_all - 15).contains("truncated: 5 bytes"));
    for (bytes, word) in [
        (
            &b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"[..],
            "is no safetensors file",
        ),
        (b"\x02\0\0\0\0\0\0\0{]", "no JSON"),
    ] {
        let text = with(&|dir| fs_err::write(dir.join("model.safetensors"), bytes).unwrap());
        assert!(text.contains(word), "{text}");
    }
    let endless =
        json!({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, u64::MAX]}}).to_string();
    let mut bytes = (endless.len() as u64).to_le_bytes().to_vec();
    bytes.extend(endless.bytes());
    let text = with(&|dir| fs_err::write(dir.join("model.safetensors"), &bytes).unwrap());
    assert!(text.contains("makes no sense"), "{text}");
}

#[test]
fn of_a_model_in_shards_each_is_checked() {
    let disks = Disks::new();
    let dir = disks.model("volume/models/Mistral-7B-Instruct-v0.2");
    let whole = Checkpoint::open(&dir).unwrap().num_bytes();
    let shards = shard(&dir);
    let found = disks.found();
    assert_eq!(found.num_files, shards.len());
    assert!(found.num_bytes > whole as u64);
    Checkpoint::open(&found.dir).unwrap();
    let kept = disks.path("kept");
    let restore = |name: &str| fs_err::copy(kept.join(name), dir.join(name)).unwrap();
    copy_dir(&dir, &kept);
    // Gone, cut, empty, of another tensor.
    fs_err::remove_file(dir.join(&shards[3])).unwrap();
    let reason = disks.reason();
    assert!(
        reason.starts_with(&format!(
            "shard `{}` is missing, {} of {} shards are whole",
            shards[3],
            shards.len() - 1,
            shards.len()
        )),
        "{reason}"
    );
    symlink("../../blobs/absent", dir.join(&shards[3])).unwrap();
    assert!(
        disks
            .reason()
            .contains("is missing (a link to a file that is not there)")
    );
    fs_err::remove_file(dir.join(&shards[3])).unwrap();
    restore(&shards[3]);
    fs_err::write(dir.join(&shards[2]), "").unwrap();
    assert!(
        disks
            .reason()
            .contains(&format!("shard `{}` is truncated: 0 bytes", shards[2]))
    );
    fs_err::copy(kept.join(&shards[4]), dir.join(&shards[2])).unwrap();
    let reason = disks.reason();
    assert!(
        reason.contains(&format!("shard `{}` has no tensor", shards[2])),
        "{reason}"
    );
    restore(&shards[2]);
    disks.found();
    // The index itself.
    for (index, word) in [
        (json!({}), "no `weight_map`"),
        (
            json!({"weight_map": {"a": "../x.safetensors"}}),
            "no plain file name",
        ),
    ] {
        fs_err::write(dir.join(INDEX_FILE), index.to_string()).unwrap();
        let reason = disks.reason();
        assert!(reason.contains(word), "{reason}");
    }
    fs_err::remove_file(dir.join(INDEX_FILE)).unwrap();
    assert!(
        disks
            .reason()
            .contains("index.json` is missing, which says what the shards hold")
    );
    // Of many faults some are told and the others counted.
    restore(INDEX_FILE);
    for name in &shards {
        fs_err::write(dir.join(name), "").unwrap();
    }
    let reason = disks.reason();
    assert_eq!(reason.matches("is truncated").count(), 8, "{reason}");
    assert!(reason.ends_with("more"), "{reason}");
}

fn copy_dir(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).unwrap();
    for entry in fs_err::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn a_snapshot_of_links_to_blobs_is_whole() {
    let disks = Disks::new();
    let repository = disks.path("volume").join(CACHED);
    copy_model("mistral", &repository.join("blobs"));
    let snapshot = repository.join("snapshots/abc");
    fs_err::create_dir_all(&snapshot).unwrap();
    for entry in fs_err::read_dir(repository.join("blobs")).unwrap() {
        let name = entry.unwrap().file_name();
        symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
    }
    assert_eq!(disks.found().dir, snapshot);
}

#[test]
fn what_is_not_found_is_told_with_every_place() {
    let disks = Disks::new();
    let roots = Roots {
        model_path: Some("/workspace/models/x".into()),
        ..disks.roots()
    };
    let error: NotFound = resolve(ID, &roots).unwrap_err();
    assert!(!error.is_partly_there());
    let text = error.to_string();
    assert!(
        text.starts_with(&format!(
            "base model `{ID}` not found; put it into `models/Mistral-7B-Instruct-v0.2`"
        )),
        "{text}"
    );
    // MODEL_PATH, four on each volume, one in the hub cache.
    assert_eq!(error.tried.len(), 1 + 3 * 4 + 1, "{text}");
    for tried in &error.tried {
        assert!(
            text.contains(&format!("{}: does not exist", tried.path.display())),
            "{text}"
        );
    }
    fs_err::create_dir_all(disks.path("volume/models/Mistral-7B-Instruct-v0.2")).unwrap();
    let error = resolve(ID, &disks.roots()).unwrap_err();
    assert!(
        error.is_partly_there() && error.to_string().contains("download again"),
        "{error}"
    );
    fs_err::create_dir_all(disks.path("workspace/models")).unwrap();
    fs_err::write(disks.path("workspace/models/Mistral-7B-Instruct-v0.2"), "").unwrap();
    let text = resolve(ID, &disks.roots()).unwrap_err().to_string();
    assert!(text.contains("is no directory"), "{text}");
    // An id that is none leads nowhere.
    disks.model("volume/models/other");
    for hostile in ["../models/other", "a/../../volume/models/other", "", "."] {
        let error = resolve(hostile, &disks.roots()).unwrap_err();
        assert!(error.tried.is_empty(), "{error}");
    }
}

/// What [`identity::check`] says of a config with `changes`, in a directory `name`.
fn identified(
    id: &str,
    name: &str,
    changes: impl std::borrow::Borrow<Value>,
) -> Result<Identity, IdentityError> {
    let disks = Disks::new();
    let dir = disks.model(name);
    rewrite_json(&dir.join("config.json"), |config| {
        for (key, value) in changes.borrow().as_object().unwrap() {
            config[key] = value.clone();
        }
    });
    identity::check(id, &dir)
}

fn shape(
    model_type: &str,
    hidden_size: u64,
    layers: u64,
    vocab_size: u64,
    rope_theta: f64,
) -> Value {
    json!({
        "model_type": model_type, "hidden_size": hidden_size, "num_hidden_layers": layers, "vocab_size": vocab_size,
        "rope_theta": rope_theta
    })
}

fn mistral_v02() -> Value {
    shape("mistral", 4096, 32, 32_000, 1e6)
}

#[test]
fn a_model_of_the_known_shape_is_the_one() {
    for (id, shape) in [
        (ID, mistral_v02()),
        ("MistralAI/mistral-7b-instruct-V0.2", mistral_v02()),
        ("Mistral-7B-Instruct-v0.2", mistral_v02()),
        (
            "mistralai/Mistral-7B-Instruct-v0.3",
            shape("mistral", 4096, 32, 32_768, 1e6),
        ),
        (
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            shape("qwen3_next", 2048, 48, 151_936, 1e7),
        ),
        (
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
            shape("qwen2", 5120, 64, 152_064, 1e6),
        ),
        (
            "meta-llama/Meta-Llama-3-70B-Instruct",
            shape("llama", 8192, 80, 128_256, 5e5),
        ),
    ] {
        let identity = identified(id, "m", shape).unwrap();
        let evidence = identity.evidence.join("\n");
        assert!(evidence.contains("has the shape of"), "{evidence}");
        assert!(identity.notes.is_empty(), "{:?}", identity.notes);
    }
    // transformers 5 writes the base elsewhere.
    let mut newer = mistral_v02();
    newer["rope_theta"] = Value::Null;
    newer["rope_parameters"] = json!({"rope_theta": 1e6});
    identified(ID, "m", newer.clone()).unwrap();
    newer["rope_parameters"] = json!({"rope_theta": 1e4});
    identified(ID, "m", newer).unwrap_err();
}

#[test]
fn the_true_configs_in_this_repository_are_known() {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/models");
    for (id, dir) in [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3-next-80b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
    ] {
        identity::check(id, &benches.join(dir)).unwrap();
        identity::check(ID, &benches.join(dir)).unwrap_err();
    }
}

#[test]
fn another_model_is_refused_by_name() {
    #[track_caller]
    fn refused(id: &str, name: &str, changes: Value, words: &[&str]) {
        let error = identified(id, name, changes).unwrap_err();
        assert!(matches!(error, IdentityError::Mismatch { .. }), "{error}");
        let text = error.to_string();
        for word in [&format!("asks for base model `{id}`"), name]
            .into_iter()
            .chain(words.iter().copied())
        {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
    // Qwen under MODEL_PATH, Mistral asked for, and the other way round.
    let next = shape("qwen3_next", 2048, 48, 151_936, 1e7);
    refused(
        ID,
        "m",
        next,
        &[
            "`model_type` is qwen3_next, expected mistral",
            "shape of `Qwen/Qwen3-Next-80B-A3B-Instruct`",
        ],
    );
    refused(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "m",
        mistral_v02(),
        &["shape of `mistralai/Mistral-7B-Instruct-v0.2`"],
    );
    // Versions and sizes of one family.
    refused(
        ID,
        "m",
        shape("mistral", 4096, 32, 32_768, 1e6),
        &["`vocab_size` is 32768, expected 32000"],
    );
    refused(
        ID,
        "m",
        shape("mistral", 4096, 32, 32_000, 1e4),
        &[
            "`rope_theta` is 10000, expected 1000000",
            "`mistralai/Mistral-7B-v0.1`",
        ],
    );
    refused(
        "Qwen/Qwen3-8B",
        "m",
        shape("qwen3", 2560, 36, 151_936, 1e6),
        &["`hidden_size` is 2560, expected 4096"],
    );
    refused(
        "Qwen/Qwen2.5-14B",
        "m",
        shape("qwen2", 5120, 64, 152_064, 1e6),
        &["`num_hidden_layers` is 64, expected 48"],
    );
    // Of the same shape, by name.
    let mut named = mistral_v02();
    named["_name_or_path"] = json!("mistralai/Mistral-7B-v0.1");
    refused(
        ID,
        "m",
        named,
        &["its config names `mistralai/Mistral-7B-v0.1`"],
    );
    refused(
        "Qwen/Qwen3-8B",
        "Qwen3-8B-Base",
        shape("qwen3", 4096, 36, 151_936, 1e6),
        &["its directory is named `Qwen3-8B-Base`"],
    );
    refused(
        "org/unknown",
        "Qwen3-8B",
        json!({}),
        &["its directory is named `Qwen3-8B`"],
    );
    refused(
        "org/unknown",
        "models--org--other/snapshots/a",
        json!({}),
        &["a snapshot of `org/other`"],
    );
}

#[test]
fn an_unknown_model_passes_with_a_note_where_something_names_it() {
    let notes = |id: &str, name: &str, changes: Value| identified(id, name, changes).unwrap();
    let nameless = identified("org/unknown", "m", json!({})).unwrap_err();
    let said = nameless.to_string();
    assert!(
        said.contains(
            "nothing says that it is `org/unknown`; where it is, name its directory `unknown`"
        ),
        "{said}"
    );
    let unknown = notes("org/unknown", "unknown", json!({}));
    assert!(unknown.notes[0].contains("the shape of `org/unknown` is not known here"));
    let named = notes(
        "org/unknown",
        "unknown",
        json!({"_name_or_path": "org/Unknown"}),
    );
    assert_eq!(
        named.evidence,
        [
            "its directory is named `unknown`",
            "its config names `org/Unknown`"
        ]
    );
    let tuned = notes(
        "org/unknown",
        "unknown",
        json!({"_name_or_path": "mistralai/Mistral-7B-v0.1"}),
    );
    assert!(
        tuned.notes.join("\n").contains("what it was made from"),
        "{tuned:?}"
    );
    // A path says nothing.
    assert_eq!(
        notes(
            "org/unknown",
            "unknown",
            json!({"_name_or_path": "/home/u/m"})
        )
        .notes
        .len(),
        1
    );
    // Its own snapshot, made from a known one.
    let mut made = mistral_v02();
    made["_name_or_path"] = json!("mistralai/Mistral-7B-v0.1");
    let own = notes(
        ID,
        "models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/a",
        made,
    );
    assert_eq!(own.evidence.len(), 2, "{own:?}");
    let disks = Disks::new();
    let dir = disks.model("m");
    fs_err::remove_file(dir.join("config.json")).unwrap();
    assert!(matches!(
        identity::check(ID, &dir),
        Err(IdentityError::Config(_))
    ));
}

fn file(path: &str, size: u64) -> RepoFile {
    RepoFile {
        path: path.to_owned(),
        size,
        sha256: None,
    }
}

/// A repository as hubs have them: three shards and much that is not needed.
fn listing() -> Vec<RepoFile> {
    let large = 50_000_000_000;
    let mut files = vec![
        file(".gitattributes", 1),
        file("README.md", 1),
        file("config.json", 10),
        file("consolidated.safetensors", 3 * large),
        file("generation_config.json", 10),
        file("model-00001-of-00003.safetensors", large),
        file("model-00002-of-00003.safetensors", large),
        file("model-00003-of-00003.safetensors", large),
        file(INDEX_FILE, 10),
        file("original/consolidated.00.pth", large),
        file("original/tokenizer.json", 10),
        file("pytorch_model.bin", 3 * large),
        file("tokenizer.json", 10),
        file("tokenizer.model", 10),
        file("tokenizer_config.json", 10),
        file("m-q4.gguf", large),
    ];
    files[5].sha256 = Some("0a".repeat(32));
    files
}

#[track_caller]
fn refused(files: &[RepoFile], index: Option<&[u8]>, word: &str) {
    let error = Wanted::choose(ID, files, index).unwrap_err();
    assert!(matches!(error, WantedError::Listing { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(ID) && text.contains(word), "{word}: {text}");
}

fn paths(wanted: &Wanted) -> Vec<&str> {
    wanted.files.iter().map(|file| file.path.as_str()).collect()
}

#[test]
fn a_download_takes_what_is_needed_and_no_more() {
    let wanted = Wanted::choose(ID, &listing(), None).unwrap();
    let expected = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX_FILE,
    ];
    assert_eq!(paths(&wanted), expected);
    assert_eq!(wanted.num_bytes, 150_000_000_060);
    assert_eq!(wanted.files[5].sha256, Some("0a".repeat(32)));
    // The index is better than names.
    let index = json!({"weight_map": {"a": "model-00002-of-00003.safetensors", "b": "consolidated.safetensors"}}).to_string();
    let wanted = Wanted::choose(ID, &listing(), Some(index.as_bytes())).unwrap();
    assert_eq!(
        paths(&wanted)[5..],
        [
            "consolidated.safetensors",
            "model-00002-of-00003.safetensors",
            INDEX_FILE
        ]
    );
    let single = [
        file("config.json", 1),
        file("tokenizer.json", 1),
        file("model.safetensors", 5),
        file("consolidated.safetensors", 5),
    ];
    let wanted = Wanted::choose(ID, &single, None).unwrap();
    assert_eq!(
        (paths(&wanted), wanted.num_bytes),
        (
            vec!["config.json", "tokenizer.json", "model.safetensors"],
            7
        )
    );
}

#[test]
fn a_listing_that_is_not_one_is_refused() {
    let without = |name: &str| {
        let mut files = listing();
        files.retain(|file| file.path != name);
        files
    };
    refused(&without("config.json"), None, "no `config.json`");
    refused(&without("tokenizer.json"), None, "no `tokenizer.json`");
    refused(
        &without("model-00002-of-00003.safetensors"),
        None,
        "shard 2 of 3 is not there",
    );
    refused(&without(INDEX_FILE), None, "the weights are .bin files");
    refused(
        &[file("config.json", 1), file("tokenizer.json", 1)],
        None,
        "no weights",
    );
    refused(&listing(), Some(b"{"), "no JSON");
    for (shard, word) in [
        ("x.safetensors", "names `x.safetensors`, which is not there"),
        ("../x", "no plain file name"),
    ] {
        let index = json!({"weight_map": {"a": shard}}).to_string();
        refused(&listing(), Some(index.as_bytes()), word);
    }
    for hostile in [
        "../x",
        "/etc/passwd",
        "a/../x",
        "a//b",
        "",
        ".",
        "a\\b",
        "a\0b",
        "C:x",
        "a/./b",
        "a\nb",
    ] {
        let mut files = listing();
        files.push(file(hostile, 1));
        refused(&files, None, "no path inside a repository");
    }
    let mut twice = listing();
    twice.push(file("config.json", 1));
    refused(&twice, None, "listed twice");
    let mut wrong = listing();
    wrong[5].sha256 = Some("xyz".to_owned());
    refused(&wrong, None, "SHA-256");
    let mut endless = listing();
    endless[5].size = u64::MAX;
    refused(&endless, None, "add up to no number");
    let countless = [
        file("config.json", 1),
        file("tokenizer.json", 1),
        file(INDEX_FILE, 1),
        file("model-1-of-99999999999.safetensors", 1),
    ];
    refused(&countless, None, "no shard");
}

#[test]
fn a_download_that_does_not_fit_is_refused_with_numbers() {
    let wanted = Wanted::choose(ID, &listing(), None).unwrap();
    let dir = Path::new("/runpod-volume/models");
    let enough = wanted.num_bytes + 2_000_000_000;
    wanted.check_space(ID, dir, enough).unwrap();
    let error = wanted.check_space(ID, dir, enough - 1).unwrap_err();
    assert!(matches!(error, WantedError::NoSpace { .. }));
    let text = error.to_string();
    for word in [
        ID,
        "takes 150.00 GB",
        "/runpod-volume/models has 152.00 GB free",
    ] {
        assert!(text.contains(word), "{text}");
    }
    // A directory that is not there yet is on the disk it will be on.
    let disks = Disks::new();
    let here = free_bytes(disks.dir.path()).unwrap();
    let below = free_bytes(&disks.path("a/b/c")).unwrap();
    assert!(here > 0 && here.abs_diff(below) < 1 << 30, "{here} {below}");
    assert!(free_bytes(Path::new("relative/absent")).unwrap() > 0);
}
