//! A layer: `x <- x + mixer(norm(x))`, `x <- x + mlp(norm(x))`, each residual add fused with the norm after it.

use super::attention::{Attention, AttentionActs, AttentionTmp};
use super::gated_delta::{GatedDelta, GatedDeltaActs, GatedDeltaTmp};
use super::mlp::{Mlp, MlpActs, MlpTmp};
use super::moe::{Moe, MoeActs, MoeTmp};
use super::rope::Rope;
use super::{Pass, Rows};
use crate::error::Result;
use crate::ops::{GradOut, NormSpec};
use crate::tensor::Tensor;

/// Weights of a layer.
#[derive(Debug)]
pub struct Block {
    /// `[D]`.
    pub input_norm: Tensor,
    /// Token mixer.
    pub mixer: Mixer,
    /// `[D]`.
    pub post_attention_norm: Tensor,
    /// Channel mixer.
    pub mlp: ChannelMixer,
    /// Constants of both norms.
    pub norm: NormSpec,
}

/// Token mixer.
#[derive(Debug)]
pub enum Mixer {
    /// Softmax attention.
    Attention(Box<Attention>),
    /// Gated DeltaNet.
    GatedDelta(Box<GatedDelta>),
}

/// Channel mixer.
#[derive(Debug)]
pub enum ChannelMixer {
    /// One SwiGLU.
    Dense(Box<Mlp>),
    /// Routed experts.
    Moe(Box<Moe>),
}

/// A norm's output and what its backward needs.
#[derive(Debug)]
pub struct NormActs {
    pub(crate) out: Tensor,
    pub(crate) rstd: Tensor,
}

impl NormActs {
    pub(crate) fn alloc(rows: &mut Rows<'_>, name: &str, hidden_size: usize) -> Result<Self> {
        rows.scope(name, |rows| {
            Ok(Self {
                out: rows.activation("out", hidden_size)?,
                rstd: rows.f32("rstd", 1)?,
            })
        })
    }
}

/// Saved by a layer's forward.
#[derive(Debug)]
pub struct BlockActs {
    pub(crate) input_norm: NormActs,
    mixer: MixerActs,
    /// The residual stream between mixer and MLP.
    pub(crate) x_mid: Tensor,
    post_attention_norm: NormActs,
    mlp: ChannelMixerActs,
}

#[derive(Debug)]
enum MixerActs {
    Attention(Box<AttentionActs>),
    GatedDelta(Box<GatedDeltaActs>),
}

#[derive(Debug)]
enum ChannelMixerActs {
    Dense(Box<MlpActs>),
    Moe(Box<MoeActs>),
}

/// Temporaries that all layers share.
#[derive(Debug)]
pub struct BlockTmp {
    /// Output of the last sub-layer, not yet added to the residual stream.
    pub(crate) delta: Tensor,
    /// Gradient of a norm's output.
    pub(crate) d_norm: Tensor,
    attention: Option<AttentionTmp>,
    gated_delta: Option<GatedDeltaTmp>,
    dense: Option<MlpTmp>,
    moe: Option<MoeTmp>,
}

impl BlockTmp {
    /// Temporaries for the kinds of sub-layer that `blocks` have.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(blocks: &[Block], rows: &mut Rows<'_>, hidden_size: usize) -> Result<Self> {
        let mut tmp = Self {
            delta: rows.activation("delta", hidden_size)?,
            d_norm: rows.activation("d_norm", hidden_size)?,
            attention: None,
            gated_delta: None,
            dense: None,
            moe: None,
        };
        for block in blocks {
            match &block.mixer {
                Mixer::Attention(attention) if tmp.attention.is_none() => {
                    tmp.attention =
                        Some(rows.scope("attention", |rows| attention.alloc_tmp(rows))?);
                }
                Mixer::GatedDelta(delta) if tmp.gated_delta.is_none() => {
                    tmp.gated_delta =
                        Some(rows.scope("gated_delta", |rows| delta.alloc_tmp(rows))?);
                }
                Mixer::Attention(_) | Mixer::GatedDelta(_) => {}
            }
            match &block.mlp {
                ChannelMixer::Dense(mlp) if tmp.dense.is_none() => {
                    tmp.dense = Some(rows.scope("mlp", |rows| mlp.alloc_tmp(rows))?);
                }
                ChannelMixer::Moe(moe) if tmp.moe.is_none() => {
                    tmp.moe = Some(rows.scope("moe", |rows| moe.alloc_tmp(rows))?);
                }
                ChannelMixer::Dense(_) | ChannelMixer::Moe(_) => {}
            }
        }
        Ok(tmp)
    }
}

/// How far down a layer's backward must go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// A layer below is trained: everything.
    Through,
    /// The mixer is the lowest trained module: not its input.
    Mixer,
    /// The MLP is: not its input.
    Mlp,
}

impl Block {
    /// Whether the token mixer has an adapter.
    pub fn mixer_has_adapter(&self) -> bool {
        match &self.mixer {
            Mixer::Attention(attention) => attention.has_adapter(),
            Mixer::GatedDelta(delta) => delta.has_adapter(),
        }
    }

    /// Whether the channel mixer has an adapter.
    pub fn mlp_has_adapter(&self) -> bool {
        match &self.mlp {
            ChannelMixer::Dense(mlp) => mlp.has_adapter(),
            ChannelMixer::Moe(moe) => moe.has_adapter(),
        }
    }

    /// Buffers of the layer.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(&self, rows: &mut Rows<'_>, hidden_size: usize) -> Result<BlockActs> {
        Ok(BlockActs {
            input_norm: NormActs::alloc(rows, "input_norm", hidden_size)?,
            mixer: match &self.mixer {
                Mixer::Attention(attention) => {
                    let acts = rows.scope("attention", |rows| attention.alloc(rows))?;
                    MixerActs::Attention(Box::new(acts))
                }
                Mixer::GatedDelta(delta) => {
                    let acts = rows.scope("gated_delta", |rows| delta.alloc(rows))?;
                    MixerActs::GatedDelta(Box::new(acts))
                }
            },
            x_mid: rows.activation("x_mid", hidden_size)?,
            post_attention_norm: NormActs::alloc(rows, "post_attention_norm", hidden_size)?,
            mlp: match &self.mlp {
                ChannelMixer::Dense(mlp) => {
                    let acts = rows.scope("mlp", |rows| mlp.alloc(rows))?;
                    ChannelMixerActs::Dense(Box::new(acts))
                }
                ChannelMixer::Moe(moe) => {
                    let acts = rows.scope("moe", |rows| moe.alloc(rows))?;
                    ChannelMixerActs::Moe(Box::new(acts))
                }
            },
        })
    }

    /// From the layer's input `x` and its norm (already in `acts.input_norm`) to the MLP's output in `tmp.delta`, which
    /// is still to be added to `acts.x_mid`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &self,
        pass: Pass<'_>,
        x: &Tensor,
        rope: &Rope,
        acts: &mut BlockActs,
        tmp: &mut BlockTmp,
    ) -> Result<()> {
        let BlockActs {
            input_norm,
            mixer,
            x_mid,
            post_attention_norm: norm,
            mlp,
        } = acts;
        let (x_norm, delta) = (&input_norm.out, &mut tmp.delta);
        match (&self.mixer, mixer) {
            (Mixer::Attention(attention), MixerActs::Attention(acts)) => {
                attention.forward(pass, delta, x_norm, rope, acts)?;
            }
            (Mixer::GatedDelta(gated_delta), MixerActs::GatedDelta(acts)) => {
                gated_delta.forward(pass, delta, x_norm, acts)?;
            }
            _ => unreachable!("activations were allocated for another layer"),
        }
        let (weight, spec) = (&self.post_attention_norm, self.norm);
        let NormActs { out, rstd } = norm;
        pass.ops
            .add_rms_norm_forward(x_mid, out, rstd, x, delta, weight, spec, pass.state)?;
        match (&self.mlp, mlp, &mut tmp.moe) {
            (ChannelMixer::Dense(mlp), ChannelMixerActs::Dense(acts), _) => {
                mlp.forward(pass, delta, out, acts)
            }
            (ChannelMixer::Moe(moe), ChannelMixerActs::Moe(acts), Some(tmp)) => {
                moe.forward(pass, delta, out, acts, tmp)
            }
            _ => unreachable!("activations were allocated for another layer"),
        }
    }

    /// `d` is the gradient of the residual stream: in, after the layer; out, before it (as far as `reach` asks).
    ///
    /// # Errors
    /// Those of the ops.
    #[expect(
        clippy::too_many_arguments,
        reason = "gradients, inputs, saved, temporaries"
    )]
    pub fn backward(
        &self,
        pass: Pass<'_>,
        d: &mut Tensor,
        d_lora: &mut Tensor,
        x: &Tensor,
        rope: &Rope,
        acts: &mut BlockActs,
        tmp: &mut BlockTmp,
        reach: Reach,
    ) -> Result<()> {
        let Pass { ops, state, .. } = pass;
        let BlockActs {
            input_norm,
            mixer,
            x_mid,
            post_attention_norm: norm,
            mlp,
        } = acts;
        let d_norm = &mut tmp.d_norm;
        let wanted = (reach != Reach::Mlp).then_some(&mut *d_norm);
        match (&self.mlp, mlp, &mut tmp.dense, &mut tmp.moe) {
            (ChannelMixer::Dense(mlp), ChannelMixerActs::Dense(acts), Some(tmp), _) => {
                let d_x = wanted.map_or(GradOut::Skip, GradOut::Overwrite);
                mlp.backward(pass, d_x, d_lora, d, &norm.out, acts, tmp)?;
            }
            (ChannelMixer::Moe(moe), ChannelMixerActs::Moe(acts), _, Some(tmp)) => {
                moe.backward(pass, wanted, d_lora, d, &norm.out, acts, tmp)?;
            }
            _ => unreachable!("activations were allocated for another layer"),
        }
        if reach == Reach::Mlp {
            return Ok(());
        }
        let (weight, spec) = (&self.post_attention_norm, self.norm);
        let add = GradOut::Add(&mut *d);
        ops.rms_norm_backward(add, d_norm, x_mid, &norm.rstd, weight, spec, state)?;
        let d_x = match reach {
            Reach::Through => GradOut::Overwrite(&mut *d_norm),
            Reach::Mixer | Reach::Mlp => GradOut::Skip,
        };
        let x_norm = &input_norm.out;
        match (&self.mixer, mixer, &mut tmp.attention, &mut tmp.gated_delta) {
            (Mixer::Attention(attention), MixerActs::Attention(acts), Some(tmp), _) => {
                attention.backward(pass, d_x, d_lora, d, x_norm, rope, acts, tmp)?;
            }
            (Mixer::GatedDelta(delta), MixerActs::GatedDelta(acts), _, Some(tmp)) => {
                delta.backward(pass, d_x, d_lora, d, x_norm, acts, tmp)?;
            }
            _ => unreachable!("activations were allocated for another layer"),
        }
        if reach == Reach::Through {
            let (weight, add) = (&self.input_norm, GradOut::Add(d));
            ops.rms_norm_backward(add, d_norm, x, &input_norm.rstd, weight, spec, state)?;
        }
        Ok(())
    }

    /// Router logits of the last forward, where the layer has a router.
    pub fn router_logits(acts: &BlockActs) -> Option<&Tensor> {
        match &acts.mlp {
            ChannelMixerActs::Moe(acts) => Some(Moe::router_logits(acts)),
            ChannelMixerActs::Dense(_) => None,
        }
    }
}
