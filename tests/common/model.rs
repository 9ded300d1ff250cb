//! A golden model: its trainer on any device, its sequences, its adapter.

use brightrun::config::model::ModelConfig;
use brightrun::config::{LoraDType, MoeLora, Optimizer, Recompute};
use brightrun::data::{Batch, StepBatches};
use brightrun::model::adapter::AdapterSettings;
use brightrun::model::weights::{self, Placed};
use brightrun::ops::Ops;
use brightrun::store::checkpoint::Checkpoint;
use brightrun::store::quantized::{QuantizePolicy, QuantizedStore};
use brightrun::train::trainer::{OptimizerSettings, Trainer};
use serde_json::Value;

use super::{Golden, golden};

/// Tokens that all golden sequences of a family have at most together.
const CAPACITY: usize = 256;

pub(crate) struct Case {
    pub(crate) family: &'static str,
    pub(crate) json: Value,
    pub(crate) trainer: Trainer,
}

/// The golden model of `family` on `ops`.
pub(crate) fn case_on(
    ops: Box<dyn Ops>,
    family: &'static str,
    targets: &[&str],
    policy: QuantizePolicy,
    weight_decay: f64,
) -> Case {
    let text = fs_err::read_to_string(golden(&format!("golden/{family}/golden.json"))).unwrap();
    let dir = golden(&format!("models/{family}"));
    let config = ModelConfig::from_file(dir.join("config.json")).unwrap();
    let mut store = QuantizedStore::new(Checkpoint::open(&dir).unwrap(), policy);
    let settings = AdapterSettings {
        rank: 4,
        expert_rank: 4,
        alpha: 8.0,
        dropout: 0.0,
        use_rslora: false,
        target_modules: targets.iter().map(|&target| target.to_owned()).collect(),
        moe_lora: MoeLora::All,
    };
    let mut source = Placed {
        source: &mut store,
        ops: &*ops,
    };
    let decoder = weights::load(&config, &mut source, settings, CAPACITY).unwrap();
    store.verify().unwrap();
    let optimizer = OptimizerSettings {
        kind: Optimizer::Adamw,
        lora_dtype: LoraDType::Fp32,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay,
        max_grad_norm: 1.0,
    };
    let trainer = Trainer::new(ops, decoder, optimizer, CAPACITY, Recompute::None, 0).unwrap();
    Case {
        family,
        json: serde_json::from_str(&text).unwrap(),
        trainer,
    }
}

pub(crate) fn integers<T: TryFrom<i64>>(value: &Value) -> Vec<T>
where
    T::Error: std::fmt::Debug,
{
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| T::try_from(v.as_i64().unwrap()).unwrap())
        .collect()
}

pub(crate) fn floats(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .collect()
}

impl Case {
    /// The golden sequences, one batch each.
    pub(crate) fn sequences(&self) -> Vec<Batch> {
        let sequences = self.json["sequences"].as_array().unwrap();
        let labels = self.json["labels"].as_array().unwrap();
        sequences
            .iter()
            .zip(labels)
            .map(|(ids, labels)| {
                let (input_ids, labels): (Vec<u32>, Vec<i32>) = (integers(ids), integers(labels));
                let length = u32::try_from(input_ids.len()).unwrap();
                let mut target_ids = labels[1..].to_vec();
                target_ids.push(-100);
                let (cu_seqlens, position_ids) = (vec![0, length], (0..length).collect());
                Batch {
                    input_ids,
                    target_ids,
                    cu_seqlens,
                    position_ids,
                }
            })
            .collect()
    }

    /// All of them packed into one batch.
    pub(crate) fn packed(&self) -> StepBatches {
        let mut batch = Batch {
            cu_seqlens: vec![0],
            ..Batch::default()
        };
        for one in self.sequences() {
            batch.input_ids.extend(one.input_ids);
            batch.target_ids.extend(one.target_ids);
            batch.position_ids.extend(one.position_ids);
            batch
                .cu_seqlens
                .push(u32::try_from(batch.input_ids.len()).unwrap());
        }
        let num_target_tokens = batch.target_ids.iter().filter(|id| **id >= 0).count();
        StepBatches {
            micro_batches: vec![batch],
            num_target_tokens,
        }
    }

    pub(crate) fn file(&self, name: &str) -> Golden {
        Golden::open(&format!("golden/{}/{name}", self.family))
    }

    pub(crate) fn load_adapter(&mut self, name: &str) {
        let file = self.file(&format!("{name}/adapter_model.safetensors"));
        let tensors: Vec<_> = self.trainer.decoder().adapter.tensors().collect();
        assert_eq!(tensors.len(), file.names().len());
        let mut values = self.trainer.adapter().values.to_f32_vec().unwrap();
        for (name, range) in tensors {
            values[range].copy_from_slice(&file.values(&format!("base_model.model.{name}")));
        }
        let adapter = self.trainer.adapter_mut();
        adapter.values.write_f32(&values).unwrap();
    }
}
