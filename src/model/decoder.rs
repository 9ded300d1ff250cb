//! The decoder: embedding, layers, final norm, head and loss; and the layer loop backwards.

use super::adapter::AdapterLayout;
use super::block::{Block, BlockActs, BlockTmp, NormActs, Reach};
use super::rope::Rope;
use super::{Pass, Rows};
use crate::config::model::ModelConfig;
use crate::error::Result;
use crate::ops::{GradOut, NormSpec};
use crate::store::Weight;
use crate::tensor::Tensor;

/// Weights of a model, with the layout of its adapter.
#[derive(Debug)]
pub struct Decoder {
    /// The model's knobs.
    pub config: ModelConfig,
    /// `[V, D]`.
    pub embedding: Weight,
    /// The layers.
    pub blocks: Vec<Block>,
    /// `[D]`.
    pub final_norm: Tensor,
    /// `[V, D]`; `None`: the embedding is used (tied).
    pub head: Option<Weight>,
    /// Tables of the rotary embedding.
    pub rope: Rope,
    /// The adapter's pairs.
    pub adapter: AdapterLayout,
}

/// Saved by forward.
#[derive(Debug)]
pub struct DecoderActs {
    /// The residual stream before each layer, and after the last.
    inputs: Vec<Tensor>,
    layers: LayerActs,
    final_norm: NormActs,
    /// Loss of each token, 0 where there is no target: `[T, 1]`.
    pub token_loss: Tensor,
}

#[derive(Debug)]
enum LayerActs {
    /// Everything is kept.
    All(Vec<BlockActs>),
    /// Only the layers' inputs are; one set of buffers per layer shape, filled again in backward.
    Recomputed {
        acts: Vec<BlockActs>,
        of_layer: Vec<usize>,
    },
}

/// Temporaries.
#[derive(Debug)]
pub struct DecoderTmp {
    block: BlockTmp,
    /// Gradient of the residual stream.
    d_residual: Tensor,
}

impl LayerActs {
    fn get(&self, layer: usize) -> &BlockActs {
        match self {
            Self::All(acts) => &acts[layer],
            Self::Recomputed { acts, of_layer } => &acts[of_layer[layer]],
        }
    }

    fn get_mut(&mut self, layer: usize) -> &mut BlockActs {
        match self {
            Self::All(acts) => &mut acts[layer],
            Self::Recomputed { acts, of_layer } => &mut acts[of_layer[layer]],
        }
    }
}

impl Decoder {
    fn norm_spec(&self) -> NormSpec {
        NormSpec {
            eps: self.config.rms_norm_eps,
            zero_centered: self.config.norm_zero_centered,
        }
    }

    /// The head's weight.
    pub fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Buffers that forward saves into; `recompute` keeps only the layers' inputs.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(&self, rows: &mut Rows<'_>, recompute: bool) -> Result<DecoderActs> {
        let (hidden, num_layers) = (self.config.hidden_size, self.blocks.len());
        let inputs: Result<Vec<Tensor>> = (0..=num_layers)
            .map(|layer| rows.activation(&format!("layers.{layer}.input"), hidden))
            .collect();
        let alloc = |rows: &mut Rows<'_>, layer: usize| {
            rows.scope(format!("layers.{layer}"), |rows| {
                self.blocks[layer].alloc(rows, hidden)
            })
        };
        let layers = if recompute {
            // Layers of one kind share buffers.
            let kinds = &self.config.layers;
            let ranks = self.ranks();
            let mut firsts: Vec<usize> = Vec::new();
            let mut of_layer = Vec::with_capacity(num_layers);
            for layer in 0..num_layers {
                let known = firsts.iter().position(|first| {
                    kinds[*first] == kinds[layer] && ranks[*first] == ranks[layer]
                });
                of_layer.push(known.unwrap_or(firsts.len()));
                if known.is_none() {
                    firsts.push(layer);
                }
            }
            let acts: Result<Vec<_>> = firsts.iter().map(|layer| alloc(rows, *layer)).collect();
            LayerActs::Recomputed {
                acts: acts?,
                of_layer,
            }
        } else {
            let acts: Result<Vec<_>> = (0..num_layers).map(|layer| alloc(rows, layer)).collect();
            LayerActs::All(acts?)
        };
        Ok(DecoderActs {
            inputs: inputs?,
            layers,
            final_norm: NormActs::alloc(rows, "final_norm", hidden)?,
            token_loss: rows.f32("token_loss", 1)?,
        })
    }

    /// Of each layer, its modules that have an adapter, and their ranks.
    fn ranks(&self) -> Vec<Vec<(&str, usize)>> {
        let mut ranks = vec![Vec::new(); self.blocks.len()];
        for module in self.adapter.modules() {
            let of_layer = module.name.strip_prefix("model.layers.");
            let parts = of_layer.and_then(|rest| rest.split_once('.'));
            let layer = parts.and_then(|(layer, name)| Some((layer.parse::<usize>().ok()?, name)));
            if let Some((layer, name)) = layer.filter(|(layer, _)| *layer < ranks.len()) {
                ranks[layer].push((name, module.pair.rank));
            }
        }
        ranks
    }

    /// Temporaries.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc_tmp(&self, rows: &mut Rows<'_>) -> Result<DecoderTmp> {
        let hidden = self.config.hidden_size;
        Ok(DecoderTmp {
            block: BlockTmp::alloc(&self.blocks, rows, hidden)?,
            d_residual: rows.activation("d_residual", hidden)?,
        })
    }

    /// Hidden states: after it `acts` holds every layer's input and the final norm's output.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &self,
        pass: Pass<'_>,
        acts: &mut DecoderActs,
        tmp: &mut DecoderTmp,
    ) -> Result<()> {
        let DecoderActs {
            inputs,
            layers,
            final_norm,
            ..
        } = acts;
        let tmp = &mut tmp.block;
        pass.ops
            .embedding_forward(&mut inputs[0], &self.embedding, pass.state)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            if layer == 0 {
                self.normalize_input(pass, layer, inputs, layers)?;
            } else {
                self.add_and_normalize(pass, layer, inputs, layers, &tmp.delta)?;
            }
            block.forward(pass, &inputs[layer], &self.rope, layers.get_mut(layer), tmp)?;
        }
        let (last, spec) = (self.blocks.len(), self.norm_spec());
        let x_mid = &layers.get(last - 1).x_mid;
        let NormActs { out, rstd } = final_norm;
        let (sum, weight, delta) = (&mut inputs[last], &self.final_norm, &tmp.delta);
        pass.ops
            .add_rms_norm_forward(sum, out, rstd, x_mid, delta, weight, spec, pass.state)
    }

    /// Norm of a layer's saved input.
    fn normalize_input(
        &self,
        pass: Pass<'_>,
        layer: usize,
        inputs: &[Tensor],
        layers: &mut LayerActs,
    ) -> Result<()> {
        let block = &self.blocks[layer];
        let NormActs { out, rstd } = &mut layers.get_mut(layer).input_norm;
        let (x, weight) = (&inputs[layer], &block.input_norm);
        pass.ops
            .rms_norm_forward(out, rstd, x, weight, block.norm, pass.state)
    }

    /// A layer's input, the sum of what the layer before left, and its norm.
    fn add_and_normalize(
        &self,
        pass: Pass<'_>,
        layer: usize,
        inputs: &mut [Tensor],
        layers: &mut LayerActs,
        delta: &Tensor,
    ) -> Result<()> {
        let block = &self.blocks[layer];
        let (sum, weight, spec) = (&mut inputs[layer], &block.input_norm, block.norm);
        let (x, norm) = match layers {
            LayerActs::All(acts) => {
                let (done, rest) = acts.split_at_mut(layer);
                (&done[layer - 1].x_mid, &mut rest[0].input_norm)
            }
            LayerActs::Recomputed { acts, of_layer } => {
                let (before, own) = (of_layer[layer - 1], of_layer[layer]);
                if before == own {
                    let BlockActs {
                        input_norm, x_mid, ..
                    } = &mut acts[own];
                    (&*x_mid, input_norm)
                } else {
                    let [before, own] = acts
                        .get_disjoint_mut([before, own])
                        .unwrap_or_else(|_| unreachable!("two different indices in range"));
                    (&before.x_mid, &mut own.input_norm)
                }
            }
        };
        let NormActs { out, rstd } = norm;
        pass.ops
            .add_rms_norm_forward(sum, out, rstd, x, delta, weight, spec, pass.state)
    }

    /// Token losses of the last forward, without gradients.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn loss(&self, pass: Pass<'_>, acts: &mut DecoderActs) -> Result<()> {
        let DecoderActs {
            final_norm,
            token_loss,
            ..
        } = acts;
        let (x, head, vocab) = (&final_norm.out, self.head(), self.config.vocab_size);
        pass.ops
            .linear_cross_entropy(token_loss, GradOut::Skip, x, head, vocab, pass.state)
    }

    /// Token losses of the last forward, and the adapters' gradients, which accumulate in `d_lora`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn loss_backward(
        &self,
        pass: Pass<'_>,
        d_lora: &mut Tensor,
        acts: &mut DecoderActs,
        tmp: &mut DecoderTmp,
    ) -> Result<()> {
        let Pass { ops, state, .. } = pass;
        let DecoderActs {
            inputs,
            layers,
            final_norm,
            token_loss,
        } = acts;
        let DecoderTmp {
            block: tmp,
            d_residual: d,
        } = tmp;
        let (head, vocab) = (self.head(), self.config.vocab_size);
        let d_norm = GradOut::Overwrite(&mut tmp.d_norm);
        ops.linear_cross_entropy(token_loss, d_norm, &final_norm.out, head, vocab, state)?;
        let (last, weight, spec) = (self.blocks.len(), &self.final_norm, self.norm_spec());
        let (d_out, rstd) = (&tmp.d_norm, &final_norm.rstd);
        let overwrite = GradOut::Overwrite(&mut *d);
        ops.rms_norm_backward(overwrite, d_out, &inputs[last], rstd, weight, spec, state)?;
        let Some(lowest) = self.lowest_trained() else {
            return Ok(());
        };
        for layer in (lowest..last).rev() {
            let block = &self.blocks[layer];
            let reach = match layer == lowest {
                false => Reach::Through,
                true if block.mixer_has_adapter() => Reach::Mixer,
                true => Reach::Mlp,
            };
            let x = &inputs[layer];
            if matches!(layers, LayerActs::Recomputed { .. }) {
                self.normalize_input(pass, layer, inputs, layers)?;
                block.forward(pass, x, &self.rope, layers.get_mut(layer), tmp)?;
            }
            let acts = layers.get_mut(layer);
            block.backward(pass, d, d_lora, x, &self.rope, acts, tmp, reach)?;
        }
        Ok(())
    }

    fn lowest_trained(&self) -> Option<usize> {
        self.blocks
            .iter()
            .position(|block| block.mixer_has_adapter() || block.mlp_has_adapter())
    }
}

impl DecoderActs {
    /// The residual stream before layer `layer` (after the last, for the number of layers), `[T, D]`.
    pub fn layer_input(&self, layer: usize) -> &Tensor {
        &self.inputs[layer]
    }

    /// The residual stream between mixer and MLP of layer `layer`, `[T, D]`; only when all activations are kept.
    pub fn layer_middle(&self, layer: usize) -> Option<&Tensor> {
        match &self.layers {
            LayerActs::All(acts) => Some(&acts[layer].x_mid),
            LayerActs::Recomputed { .. } => None,
        }
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.inputs.len() - 1
    }

    /// The final norm's output, `[T, D]`.
    pub fn final_norm(&self) -> &Tensor {
        &self.final_norm.out
    }

    /// Router logits of layer `layer`; only when all activations are kept.
    pub fn router_logits(&self, layer: usize) -> Option<&Tensor> {
        match &self.layers {
            LayerActs::All(acts) => Block::router_logits(&acts[layer]),
            LayerActs::Recomputed { .. } => None,
        }
    }
}
