//! NF4 as bitsandbytes computes it: direct cases, and every quantised weight of six golden models by hash.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use brightrun::store::Weight;
use brightrun::store::checkpoint::Checkpoint;
use brightrun::store::nf4::{Absmax, CODEBOOK, Nf4Matrix, dynamic, num_bytes};
use brightrun::store::quantized::{QuantizePolicy, QuantizedStore};
use brightrun::tensor::{DType, Tensor};
use common::{FAMILIES, Golden, SEVEN, golden};
use serde_json::Value;
use sha2::{Digest, Sha256};

const CASES: [&str; 8] = [
    "f32_64x64",
    "bf16_48x80",
    "f32_300x64_multi_nested",
    "f32_odd_7x5",
    "f32_partial_33x66",
    "f32_1x1",
    "fp16_16x64",
    "f32_zero_tiny_huge_rows",
];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn plain(matrix: &Nf4Matrix) -> Vec<f32> {
    match &matrix.absmax {
        Absmax::Plain(absmax) => absmax.f32().unwrap().to_vec(),
        Absmax::Nested { .. } => panic!("expected plain absmax"),
    }
}

fn nested(matrix: &Nf4Matrix) -> (Vec<u8>, Vec<f32>, f32) {
    match &matrix.absmax {
        Absmax::Nested {
            codes,
            nested_absmax,
            offset,
        } => (
            codes.u8().unwrap().to_vec(),
            nested_absmax.f32().unwrap().to_vec(),
            *offset,
        ),
        Absmax::Plain(_) => panic!("expected nested absmax"),
    }
}

fn ulps(a: f32, b: f32) -> u32 {
    a.to_bits().abs_diff(b.to_bits())
}

/// Limits of the manifest: the offset within 2 ulp; at most 0.5 % of the codes off by one, and none where the offset is equal.
fn assert_nested(
    found: &(Vec<u8>, Vec<f32>, f32),
    expected: &(Vec<u8>, Vec<f32>, f32),
    name: &str,
) {
    let distance = ulps(found.2, expected.2);
    assert!(
        distance <= 2,
        "{name}: offset {} against {}",
        found.2,
        expected.2
    );
    assert_eq!(found.0.len(), expected.0.len(), "{name}");
    let off: Vec<u8> = found
        .0
        .iter()
        .zip(&expected.0)
        .map(|(f, e)| f.abs_diff(*e))
        .filter(|diff| *diff != 0)
        .collect();
    let allowed = if distance == 0 {
        0
    } else {
        expected.0.len().div_ceil(200)
    };
    assert!(
        off.len() <= allowed && off.iter().all(|diff| *diff == 1),
        "{name}: {} of {} scale codes differ",
        off.len(),
        expected.0.len()
    );
    for (f, e) in found.1.iter().zip(&expected.1) {
        assert!(
            ulps(*f, *e) == 0
                || distance > 0 && (f - e).abs() <= 4.0 * f32::EPSILON * found.2.abs(),
            "{name}: nested absmax {f} against {e}"
        );
    }
}

#[test]
fn codebooks_are_those_of_bitsandbytes() {
    let file = Golden::open("nf4/nf4_cases.safetensors");
    assert_eq!(bits(&CODEBOOK), bits(&file.values("nf4_code")));
    assert_eq!(bits(&dynamic::CODE), bits(&file.values("dynamic_code_256")));
}

#[test]
fn quantises_and_dequantises_every_case_bit_for_bit() {
    let file = Golden::open("nf4/nf4_cases.safetensors");
    for name in CASES.into_iter().chain(["f32_boundaries"]) {
        let weight = file.array(&format!("{name}.weight"));
        let [rows, columns] = weight.shape[..] else {
            panic!("{name} is no matrix")
        };
        let matrix = Nf4Matrix::quantize(name, &weight.values, [rows, columns], false).unwrap();
        assert_eq!(
            matrix.codes.u8().unwrap(),
            file.bytes(&format!("{name}.packed")),
            "{name}: codes"
        );
        assert_eq!(
            bits(&plain(&matrix)),
            bits(&file.values(&format!("{name}.absmax"))),
            "{name}: absmax"
        );
        // The reference rounds to the weight's own type; so does this comparison.
        let key = format!("{name}.dequant");
        let dequantised = file.round_like(&key, &matrix.to_f32_vec().unwrap());
        assert_eq!(
            bits(&dequantised),
            bits(&file.values(&key)),
            "{name}: values"
        );
    }
}

#[test]
fn double_quantisation_stays_within_the_limits_of_the_manifest() {
    let file = Golden::open("nf4/nf4_cases.safetensors");
    for name in CASES.into_iter().chain(["f32_boundaries"]) {
        let weight = file.array(&format!("{name}.weight"));
        let shape = [weight.shape[0], weight.shape[1]];
        let matrix = Nf4Matrix::quantize(name, &weight.values, shape, true).unwrap();
        assert_eq!(
            matrix.codes.u8().unwrap(),
            file.bytes(&format!("{name}.packed")),
            "{name}: codes"
        );
        let expected = (
            file.bytes(&format!("{name}.nested.absmax_u8")),
            file.values(&format!("{name}.nested.absmax2")),
            file.values(&format!("{name}.nested.offset"))[0],
        );
        let found = nested(&matrix);
        assert_nested(&found, &expected, name);
        // What is counted before a weight is read is what is then held: codes, scale codes, nested scales, offset.
        let held = matrix.codes.num_bytes() + found.0.len() + 4 * found.1.len() + 4;
        let len = weight.values.len();
        assert_eq!(num_bytes(len, true), held, "{name}");
        let plain_held = matrix.codes.num_bytes() + 4 * found.0.len();
        assert_eq!(num_bytes(len, false), plain_held, "{name}");
    }
}

fn store(dir: &std::path::Path, policy: QuantizePolicy) -> QuantizedStore {
    QuantizedStore::new(Checkpoint::open(dir).unwrap(), policy)
}

fn modules(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn quantised(store: &mut QuantizedStore, name: &str, reference: &Value) -> Nf4Matrix {
    let size = |at: usize| usize::try_from(reference["shape"][at].as_u64().unwrap()).unwrap();
    match store.matrix(name, size(0), size(1)).unwrap() {
        Weight::Nf4(matrix) => matrix,
        Weight::Dense(_) => panic!("{name} was left unquantised"),
    }
}

/// First 16 hex digits of SHA-256 over the little-endian bytes.
fn sha(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let digest = Sha256::digest(bytes);
    digest.iter().take(8).fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn sha_f32(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    sha(&bytes)
}

#[test]
fn every_quantised_weight_of_the_golden_models_has_the_hashes_of_bitsandbytes() {
    let mut num_weights = 0;
    for family in FAMILIES {
        let text = fs_err::read_to_string(golden(&format!("golden/{family}/golden.json"))).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let dir = golden(&format!("models/{family}"));
        let mut single = store(&dir, QuantizePolicy::modules(modules(&SEVEN), false));
        for (name, reference) in json["nf4_weights"].as_object().unwrap() {
            let matrix = quantised(&mut single, name, reference);
            assert_eq!(
                sha(matrix.codes.u8().unwrap()),
                reference["packed_sha"],
                "{name}"
            );
            assert_eq!(sha_f32(&plain(&matrix)), reference["absmax_sha"], "{name}");
            assert_eq!(
                sha_f32(&matrix.to_f32_vec().unwrap()),
                reference["dequant_sha"],
                "{name}"
            );
            num_weights += 1;
        }
        let mut double = store(&dir, QuantizePolicy::modules(modules(&SEVEN), true));
        let state = Golden::open(&format!("golden/{family}/nf4dq_state.safetensors"));
        let (u8s, absmax2) = (state.bytes("absmax_u8"), state.values("absmax2"));
        let offsets = state.values("offset");
        let index: Value = serde_json::from_str(&state.metadata("index")).unwrap();
        for (at, entry) in index.as_array().unwrap().iter().enumerate() {
            let name = entry[0].as_str().unwrap();
            let reference = &json["nf4dq_weights"][name];
            let number = |i: usize| usize::try_from(entry[i].as_u64().unwrap()).unwrap();
            let matrix = quantised(&mut double, name, reference);
            assert_eq!(
                sha(matrix.codes.u8().unwrap()),
                reference["packed_sha"],
                "{name}"
            );
            let expected = (
                u8s[number(1)..number(1) + number(2)].to_vec(),
                absmax2[number(3)..number(3) + number(4)].to_vec(),
                offsets[at],
            );
            let found = nested(&matrix);
            assert_nested(&found, &expected, name);
            if found == expected {
                let dequant = sha_f32(&matrix.to_f32_vec().unwrap());
                assert_eq!(dequant, reference["dequant_sha"], "{name}");
            }
        }
    }
    assert_eq!(num_weights, 4 * 14 + 44 + 112);
}

#[test]
fn the_default_policy_quantises_the_projections_of_the_reference() {
    let text = fs_err::read_to_string(golden("golden/qwen3_next/nf4dq_default.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let dir = golden("models/qwen3_next");
    let mut store = store(&dir, QuantizePolicy::defaults(true));
    for (name, reference) in json["extra_weights"].as_object().unwrap() {
        let matrix = quantised(&mut store, name, reference);
        assert_eq!(
            sha(matrix.codes.u8().unwrap()),
            reference["packed_sha"],
            "{name}"
        );
    }
    for name in [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.linear_attn.in_proj_ba.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ] {
        let shape = Checkpoint::open(&dir)
            .unwrap()
            .shape_of(name)
            .unwrap()
            .to_vec();
        let weight = store.matrix(name, shape[0], shape[1]).unwrap();
        assert!(
            matches!(weight, Weight::Dense(_)),
            "{name} must stay as stored"
        );
    }
}

#[test]
fn any_range_dequantises_to_the_same_values() {
    // 33 x 67: rows start inside blocks, the last block is short and the count odd.
    let weights: Vec<f32> = (0..33_i16 * 67)
        .map(|i| f32::from((i % 101) * 37 % 101) - 50.0)
        .collect();
    for double_quant in [false, true] {
        let matrix = Nf4Matrix::quantize("w", &weights, [33, 67], double_quant).unwrap();
        let all = matrix.to_f32_vec().unwrap();
        let view = matrix.view().unwrap();
        for start in [0, 1, 63, 64, 65, 127, 500, 2209] {
            for len in [0, 1, 2, 63, 64, 65, 130] {
                let len = usize::min(len, all.len() - start);
                let mut out = vec![f32::NAN; len];
                view.dequantize(start, &mut out);
                assert_eq!(bits(&out), bits(&all[start..start + len]), "{start}+{len}");
            }
        }
    }
}

#[test]
fn what_is_not_a_number_is_refused_by_name() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weights = vec![1.0; 300];
        weights[299] = bad;
        let error =
            Nf4Matrix::quantize("layer.q_proj.weight", &weights, [3, 100], true).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layer.q_proj.weight: holds a NaN or infinite weight, expected finite ones; download the checkpoint again"
        );
    }
    let error = Nf4Matrix::quantize("w", &[1.0; 5], [2, 3], false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("w has shape [5], expected [2, 3]"),
        "{error}"
    );
    let vector = Tensor::zeros("bias", &[4], DType::F32);
    assert!(Nf4Matrix::from_tensor(&vector, false).is_err());
}
