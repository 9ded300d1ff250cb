//! One optimizer step: forward and backward over its micro-batches, then the update. No allocation, no I/O.

use super::buffers::{AdapterState, BufferSettings, Buffers, Memory};
use crate::config::{LoraDType, Optimizer, Recompute, TrainConfig};
use crate::data::{Batch, StepBatches};
use crate::error::{Error, Result};
use crate::model::Pass;
use crate::model::decoder::{Decoder, DecoderActs, DecoderTmp};
use crate::ops::{AdamWStep, DropoutState, Ops, StepState};
use crate::tensor::Tensor;
use crate::tensor::arena::Arena;

/// The optimizer's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
    /// How the moments are kept.
    pub kind: Optimizer,
    /// Element type of the adapter.
    pub lora_dtype: LoraDType,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Limit of the global gradient norm; 0: none.
    pub max_grad_norm: f64,
}

impl OptimizerSettings {
    /// Those of `config`.
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            kind: config.optimizer,
            lora_dtype: config.lora_dtype,
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
        }
    }

    /// Those of update number `step` at `learning_rate`.
    pub(super) fn at(self, step: u64, learning_rate: f64, seed: u64) -> AdamWStep {
        AdamWStep {
            learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            step,
            seed,
        }
    }
}

/// What one optimizer step came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean loss over the step's target tokens, before the update.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Target tokens.
    pub num_target_tokens: usize,
    /// All tokens.
    pub num_tokens: usize,
}

/// A model, its adapter and its buffers.
#[derive(Debug)]
pub struct Trainer {
    ops: Box<dyn Ops>,
    decoder: Decoder,
    adapter: AdapterState,
    acts: DecoderActs,
    tmp: DecoderTmp,
    optimizer: OptimizerSettings,
    seed: u64,
    recompute: bool,
    memory: Arena,
}

impl Trainer {
    /// Allocates everything for micro-batches of up to `capacity` tokens; the adapter starts at PEFT's initial values.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn new(
        ops: Box<dyn Ops>,
        decoder: Decoder,
        optimizer: OptimizerSettings,
        capacity: usize,
        recompute: Recompute,
        seed: u64,
    ) -> Result<Self> {
        let settings = BufferSettings {
            capacity,
            optimizer,
            recompute,
        };
        let state = StepState::default();
        let Buffers {
            memory,
            recompute,
            ledger,
        } = Buffers::alloc(&*ops, &decoder, settings, &state)?;
        let Memory {
            mut adapter,
            acts,
            tmp,
        } = memory;
        adapter.begin(&decoder.adapter, seed)?;
        Ok(Self {
            ops,
            decoder,
            adapter,
            acts,
            tmp,
            optimizer,
            seed,
            recompute,
            memory: ledger,
        })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The adapter's arenas.
    pub fn adapter(&self) -> &AdapterState {
        &self.adapter
    }

    /// The adapter's arenas, to be set from a checkpoint.
    pub fn adapter_mut(&mut self) -> &mut AdapterState {
        &mut self.adapter
    }

    /// What the last forward left.
    pub fn activations(&self) -> &DecoderActs {
        &self.acts
    }

    /// Whether activations are recomputed in backward.
    pub fn recomputes(&self) -> bool {
        self.recompute
    }

    /// Free bytes of the device; `None` where its memory is the host's.
    ///
    /// # Errors
    /// Those of the device.
    pub fn free_memory(&self) -> Result<Option<u64>> {
        self.ops.free_memory()
    }

    /// The buffers it allocated.
    pub fn memory(&self) -> &Arena {
        &self.memory
    }

    /// Gradients of one optimizer step, left in the adapter's `grads`; returns the sum of the target tokens' losses.
    ///
    /// `completed` counts the optimizer steps before this one.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn accumulate(&mut self, batches: &StepBatches, completed: u64) -> Result<f64> {
        self.passes(batches, completed)?;
        let losses = self.acts.token_loss.to_f32_vec()?;
        Ok(losses.iter().map(|loss| f64::from(*loss)).sum())
    }

    /// Forward and backward over the step's micro-batches. Nothing here waits for the device.
    fn passes(&mut self, batches: &StepBatches, completed: u64) -> Result<()> {
        self.acts.token_loss.zero()?;
        for state in self.states(batches, completed) {
            self.ops.load_batch(&state)?;
            let pass = Pass {
                ops: &*self.ops,
                lora: &self.adapter.values,
                state: &state,
            };
            let (decoder, acts, tmp) = (&self.decoder, &mut self.acts, &mut self.tmp);
            let grads = &mut self.adapter.grads;
            self.ops.recorded("pass", &mut || {
                decoder.forward(pass, acts, tmp)?;
                decoder.loss_backward(pass, grads, acts, tmp)
            })?;
        }
        Ok(())
    }

    /// What each micro-batch of a step tells the ops.
    fn states(&self, batches: &StepBatches, completed: u64) -> Vec<StepState> {
        let mut first_token = 0;
        let state = |batch: &Batch| {
            let dropout = DropoutState {
                seed: self.seed,
                optimizer_step: u32::try_from(completed).unwrap_or(u32::MAX),
                first_token,
            };
            first_token += u32::try_from(batch.input_ids.len()).unwrap_or(u32::MAX);
            StepState {
                batch: batch.clone(),
                loss_scale: 1.0 / batches.num_target_tokens as f32,
                dropout: Some(dropout),
            }
        };
        batches.micro_batches.iter().map(state).collect()
    }

    /// One optimizer step at `learning_rate`; `completed` counts those before it.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where loss or gradient is not finite: the adapter is as it was before.
    pub fn step(
        &mut self,
        batches: &StepBatches,
        completed: u64,
        learning_rate: f64,
    ) -> Result<StepReport> {
        self.passes(batches, completed)?;
        let step = completed + 1;
        let settings = self.optimizer.at(step, learning_rate, self.seed);
        let report = self.adapter.update(&*self.ops, &self.acts, settings)?;
        if !report.applied {
            return Err(if report.loss_sum.is_finite() {
                self.non_finite_gradient(step)?
            } else {
                self.non_finite_loss(batches, completed)?
            });
        }
        Ok(StepReport {
            loss: report.loss_sum / batches.num_target_tokens as f64,
            grad_norm: report.grad_norm,
            num_target_tokens: batches.num_target_tokens,
            num_tokens: batches
                .micro_batches
                .iter()
                .map(|batch| batch.input_ids.len())
                .sum(),
        })
    }

    /// Sum of the target tokens' losses over `batches`, without dropout or gradients, and their number.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn evaluate(&mut self, batches: &[Batch]) -> Result<(f64, usize)> {
        let (mut loss_sum, mut num_target_tokens) = (0.0, 0);
        for batch in batches {
            let state = StepState {
                batch: batch.clone(),
                loss_scale: 1.0,
                dropout: None,
            };
            self.acts.token_loss.zero()?;
            self.forward(&state)?;
            let losses = self.acts.token_loss.leading_f32(state.num_tokens())?;
            loss_sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            num_target_tokens += state.target_rows().len();
        }
        Ok((loss_sum, num_target_tokens))
    }

    /// Activations and token losses of one micro-batch; the losses are added to what is there.
    fn forward(&mut self, state: &StepState) -> Result<()> {
        self.ops.load_batch(state)?;
        let pass = Pass {
            ops: &*self.ops,
            lora: &self.adapter.values,
            state,
        };
        let (decoder, acts, tmp) = (&self.decoder, &mut self.acts, &mut self.tmp);
        self.ops.recorded("forward", &mut || {
            decoder.forward(pass, acts, tmp)?;
            decoder.loss(pass, acts)
        })
    }

    /// Names the first layer whose output is not finite. The adapter is as it was, so the micro-batches give the same again.
    fn non_finite_loss(&mut self, batches: &StepBatches, completed: u64) -> Result<Error> {
        self.adapter.grads.zero()?;
        let mut culprit = "the loss (head and cross-entropy)".to_owned();
        for state in self.states(batches, completed) {
            self.forward(&state)?;
            if let Some(found) = self.non_finite_layer(state.num_tokens())? {
                culprit = format!("the loss, first at {found}");
                break;
            }
        }
        let advice =
            "the adapter is kept as it was before this step; lower `learning_rate`, or check \
                      the base weights of that layer"
                .to_owned();
        Ok(Error::NonFinite {
            step: completed + 1,
            what: culprit,
            advice,
        })
    }

    /// The first of the last forward's residual streams that is not finite in its leading `tokens` rows.
    fn non_finite_layer(&self, tokens: usize) -> Result<Option<String>> {
        let finite = |tensor: &Tensor| -> Result<bool> {
            let values = tensor.leading_f32(tokens * tensor.row_len())?;
            Ok(values.iter().all(|value| value.is_finite()))
        };
        for layer in 0..=self.acts.num_layers() {
            if !finite(self.acts.layer_input(layer))? {
                return Ok(Some(match layer {
                    0 => "the embedding".to_owned(),
                    layer => format!("the output of layer {}", layer - 1),
                }));
            }
        }
        let norm_is_finite = finite(self.acts.final_norm())?;
        Ok((!norm_is_finite).then(|| "the final norm".to_owned()))
    }

    /// Names the highest module whose gradient is not finite: backward goes from top to bottom.
    fn non_finite_gradient(&mut self, step: u64) -> Result<Error> {
        let grads = self.adapter.grads.to_f32_vec()?;
        let tensors: Vec<_> = self.decoder.adapter.tensors().collect();
        let broken = tensors
            .iter()
            .rev()
            .find(|(_, range)| grads[range.clone()].iter().any(|value| !value.is_finite()));
        let what = match broken {
            Some((name, _)) => format!("the gradient of {name}"),
            None => "the gradient norm".to_owned(),
        };
        self.adapter.grads.zero()?;
        let advice =
            "the adapter is kept as it was before this step; lower `learning_rate` or set \
                      `max_grad_norm`"
                .to_owned();
        Ok(Error::NonFinite { step, what, advice })
    }
}
