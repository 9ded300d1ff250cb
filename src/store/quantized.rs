//! Weights as the run holds them: NF4 or as stored, decided by module name, and counted.

use crate::config::{AdapterKind, TrainConfig};
use crate::error::{Error, Result};
use crate::store::Weight;
use crate::store::checkpoint::Checkpoint;
use crate::store::nf4::Nf4Matrix;
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

/// Hands out the weights of a checkpoint, quantising on the way. Nothing is held twice: a dense weight is a view of the
/// mapped file, and of a quantised one only codes and scales stay.
#[derive(Debug)]
pub struct QuantizedStore {
    checkpoint: Checkpoint,
    policy: QuantizePolicy,
    matched: Vec<bool>,
    counts: WeightCounts,
}

impl QuantizedStore {
    /// Weights of `checkpoint` under `policy`.
    pub fn new(checkpoint: Checkpoint, policy: QuantizePolicy) -> Self {
        let matched = vec![false; policy.modules.len()];
        Self {
            checkpoint,
            policy,
            matched,
            counts: WeightCounts::default(),
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
        let tensor = self.checkpoint.tensor(name, &[out_features, in_features])?;
        self.hold(name, tensor)
    }

    /// Small tensor `name`, widened to f32.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`].
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        self.counts.num_dense += 1;
        self.counts.dense_bytes += tensor.len() * DType::F32.size();
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
        if self.checkpoint.contains(&fused) {
            let gate_up = self
                .checkpoint
                .tensor(&fused, &[num_experts, 2 * width, hidden])?;
            let gate_up = gate_up.reshaped(&[num_experts * 2 * width, hidden])?;
            let downs = format!("{prefix}.down_proj");
            let downs = self
                .checkpoint
                .tensor(&downs, &[num_experts, hidden, width])?;
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
        let matrix = Nf4Matrix::from_tensor(&tensor, self.policy.double_quant)?;
        self.counts.num_nf4 += 1;
        self.counts.nf4_bytes += matrix.num_bytes();
        Ok(Weight::Nf4(matrix))
    }

    /// Checks, once the model is loaded, that every module the user named for NF4 was found.
    ///
    /// # Errors
    /// [`Error::Config`] naming an entry of `quantize_modules` that matched nothing.
    pub fn verify(&self) -> Result<()> {
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

fn policy_error(entry: &str, reason: &str) -> Error {
    Error::Config {
        origin: "quantize_modules".to_owned(),
        reason: format!("`{entry}` cannot be quantised: {reason}"),
    }
}
