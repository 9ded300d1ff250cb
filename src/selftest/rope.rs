//! Cases of `qk_norm_rope`.

use super::stage::{scaled, state, values};
use super::{Case, Outputs, Stage};
use crate::error::Result;
use crate::ops::{AttentionSpec, NormSpec, QkWeights, StepState};
use crate::tensor::Tensor;

const EPS: f32 = 1e-6;

/// One call: its heads, which norm there is, and the packed sequences.
#[derive(Debug, Clone)]
struct Call {
    spec: AttentionSpec,
    lengths: Vec<usize>,
}

/// q or k of a call.
struct Side {
    name: &'static str,
    num_heads: usize,
    /// Elements from head to head of the projection.
    stride: usize,
    /// `[T, num_heads, stride]`.
    proj: Vec<f32>,
    /// `[T, num_heads, head_dim]`.
    d_out: Vec<f32>,
    weight: Vec<f32>,
}

fn call(
    [head_dim, rotary_dim]: [usize; 2],
    [heads, kv_heads]: [usize; 2],
    zero_centered: Option<bool>,
    output_gate: bool,
    lengths: &[usize],
) -> Call {
    let norm = |zero_centered| NormSpec {
        eps: EPS,
        zero_centered,
    };
    Call {
        spec: AttentionSpec {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            output_gate,
            sliding_window: None,
            qk_norm: zero_centered.map(norm),
            rotary_dim,
        },
        lengths: lengths.to_vec(),
    }
}

/// Heads of one and of many lanes, partners in the same lane and in others, every norm, with and without a gate.
fn calls() -> Vec<Call> {
    vec![
        call([16, 4], [2, 1], Some(true), true, &[1]),
        call([16, 16], [3, 1], None, false, &[7]),
        call([48, 24], [4, 2], Some(false), false, &[5, 2]),
        call([64, 64], [8, 2], Some(false), false, &[20, 13]),
        call([80, 80], [2, 2], None, false, &[3, 4]),
        call([128, 128], [5, 1], Some(false), true, &[9]),
        call([256, 64], [4, 1], Some(true), true, &[6, 7]),
        call([256, 256], [1, 1], Some(true), false, &[5]),
    ]
}

impl Call {
    fn label(&self) -> String {
        let spec = &self.spec;
        let norm = match spec.qk_norm {
            None => "none",
            Some(norm) if norm.zero_centered => "zero_centered",
            Some(_) => "plain",
        };
        format!(
            "head_dim={},rotary_dim={},heads={}/{},norm={norm},gate={},lengths={:?}",
            spec.head_dim,
            spec.rotary_dim,
            spec.num_attention_heads,
            spec.num_key_value_heads,
            spec.output_gate,
            self.lengths
        )
    }

    fn state(&self) -> StepState {
        state(&self.lengths, 100, 1)
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn capacity(&self) -> usize {
        self.tokens() + 3
    }

    fn sides(&self) -> [Side; 2] {
        let (spec, tokens) = (&self.spec, self.tokens());
        let side = |name, num_heads, stride, seed| Side {
            name,
            num_heads,
            stride,
            proj: values(tokens * num_heads * stride, seed),
            d_out: values(tokens * num_heads * spec.head_dim, seed + 1),
            weight: scaled(spec.head_dim, seed + 2, 0.5),
        };
        [
            side("q", spec.num_attention_heads, spec.q_head_stride(), 2),
            side("k", spec.num_key_value_heads, spec.head_dim, 5),
        ]
    }

    /// `[positions, rotary_dim / 2]` of `cos` or `sin`.
    fn table(&self, of: fn(f64) -> f64) -> Vec<f32> {
        let half = self.spec.rotary_dim / 2;
        let positions = self.lengths.iter().copied().max().unwrap_or(0);
        let angle =
            |position: usize, i: usize| position as f64 * 100_f64.powf(-(i as f64) / half as f64);
        let at = |position| (0..half).map(move |i| of(angle(position, i)) as f32);
        (0..positions).flat_map(at).collect()
    }

    /// Rotates a head of a token by its angles, times `sign`.
    fn rotate(&self, head: &mut [f64], token: usize, sign: f64) {
        let half = self.spec.rotary_dim / 2;
        let position = self.state().batch.position_ids[token] as usize;
        let (cos, sin) = (self.table(f64::cos), self.table(f64::sin));
        for i in 0..half {
            let cos = f64::from(cos[position * half + i]);
            let sin = sign * f64::from(sin[position * half + i]);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }
}

impl Side {
    /// A head of the projection's output, without its gate.
    fn head(&self, token: usize, head: usize, head_dim: usize) -> Vec<f64> {
        let first = (token * self.num_heads + head) * self.stride;
        let head = &self.proj[first..first + head_dim];
        head.iter().map(|x| f64::from(*x)).collect()
    }

    /// Factor of dimension `i` after the norm.
    fn factor(&self, norm: NormSpec, i: usize) -> f64 {
        f64::from(self.weight[i]) + if norm.zero_centered { 1.0 } else { 0.0 }
    }

    /// `[T, num_heads]`.
    fn rstd(&self, call: &Call) -> Vec<f64> {
        let head_dim = call.spec.head_dim;
        let rstd = |at: usize| {
            let x = self.head(at / self.num_heads, at % self.num_heads, head_dim);
            let mean = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
            1.0 / (mean + f64::from(EPS)).sqrt()
        };
        (0..call.tokens() * self.num_heads).map(rstd).collect()
    }

    fn forward(&self, call: &Call) -> Vec<f64> {
        let mut out = Vec::new();
        let rstd = self.rstd(call);
        for (at, rstd) in rstd.iter().enumerate() {
            let token = at / self.num_heads;
            let mut head = self.head(token, at % self.num_heads, call.spec.head_dim);
            if let Some(norm) = call.spec.qk_norm {
                for (i, x) in head.iter_mut().enumerate() {
                    *x *= rstd * self.factor(norm, i);
                }
            }
            call.rotate(&mut head, token, 1.0);
            out.extend(head);
        }
        out
    }

    /// From the f32 `rstd` that forward saved.
    fn backward(&self, call: &Call) -> Vec<f64> {
        let head_dim = call.spec.head_dim;
        let mut d_proj = Vec::new();
        let rstd = self.rstd(call);
        for (at, rstd) in rstd.iter().enumerate() {
            let token = at / self.num_heads;
            let d_out = &self.d_out[at * head_dim..][..head_dim];
            let mut d: Vec<f64> = d_out.iter().map(|d| f64::from(*d)).collect();
            call.rotate(&mut d, token, -1.0);
            if let Some(norm) = call.spec.qk_norm {
                let rstd = f64::from(*rstd as f32);
                let x = self.head(token, at % self.num_heads, head_dim);
                let scaled: Vec<f64> = (0..head_dim).map(|i| d[i] * self.factor(norm, i)).collect();
                let products = scaled.iter().zip(&x).map(|(d, x)| d * x * rstd);
                let mean = products.sum::<f64>() / head_dim as f64;
                for i in 0..head_dim {
                    d[i] = rstd * (scaled[i] - x[i] * rstd * mean);
                }
            }
            d_proj.extend(d);
        }
        d_proj
    }
}

/// Norm weights and tables on the device.
struct Placed {
    weights: Option<[Tensor; 2]>,
    cos: Tensor,
    sin: Tensor,
}

impl Placed {
    fn new(call: &Call, sides: &[Side; 2], stage: &Stage<'_>) -> Result<Self> {
        let weight = |side: &Side| stage.f32("weight", &[side.weight.len()], &side.weight);
        let weights = match call.spec.qk_norm {
            Some(_) => Some([weight(&sides[0])?, weight(&sides[1])?]),
            None => None,
        };
        let table = |name, of: fn(f64) -> f64| {
            let (values, half) = (call.table(of), call.spec.rotary_dim / 2);
            stage.f32(name, &[values.len() / half, half], &values)
        };
        Ok(Self {
            weights,
            cos: table("cos", f64::cos)?,
            sin: table("sin", f64::sin)?,
        })
    }

    fn weights(&self) -> QkWeights<'_> {
        QkWeights {
            q_norm: self.weights.as_ref().map(|[q, _]| q),
            k_norm: self.weights.as_ref().map(|[_, k]| k),
            cos: &self.cos,
            sin: &self.sin,
        }
    }
}

fn run_forward(call: &Call, stage: &Stage<'_>) -> Result<Outputs> {
    let (state, sides, capacity) = (call.state(), call.sides(), call.capacity());
    let (tokens, head_dim) = (call.tokens(), call.spec.head_dim);
    stage.load(&state)?;
    let placed = Placed::new(call, &sides, stage)?;
    let proj = |side: &Side| {
        let width = side.num_heads * side.stride;
        stage.rows("proj", [capacity, width], &side.proj)
    };
    let out = |side: &Side| stage.out(side.name, &[capacity, side.num_heads * head_dim]);
    let rstd = |side: &Side| stage.out_f32("rstd", &[capacity, side.num_heads]);
    let [q_side, k_side] = &sides;
    let (mut q, mut k) = (out(q_side)?, out(k_side)?);
    let (mut q_rstd, mut k_rstd) = (rstd(q_side)?, rstd(k_side)?);
    stage.ops.qk_norm_rope_forward(
        &mut q,
        &mut k,
        &mut q_rstd,
        &mut k_rstd,
        &proj(q_side)?,
        &proj(k_side)?,
        placed.weights(),
        call.spec,
        &state,
    )?;
    let outputs = Outputs::new()
        .activation("q", stage.read_rows(&q, tokens)?)
        .activation("k", stage.read_rows(&k, tokens)?);
    Ok(match call.spec.qk_norm {
        None => outputs,
        Some(_) => outputs
            .f32("q_rstd", stage.read_rows(&q_rstd, tokens)?)
            .f32("k_rstd", stage.read_rows(&k_rstd, tokens)?),
    })
}

fn expected_forward(call: &Call) -> Outputs {
    let [q, k] = call.sides();
    let outputs = Outputs::new()
        .activation("q", q.forward(call))
        .activation("k", k.forward(call));
    match call.spec.qk_norm {
        None => outputs,
        Some(_) => outputs
            .f32("q_rstd", q.rstd(call))
            .f32("k_rstd", k.rstd(call)),
    }
}

fn run_backward(call: &Call, stage: &Stage<'_>) -> Result<Outputs> {
    let (state, sides, capacity) = (call.state(), call.sides(), call.capacity());
    let (tokens, head_dim) = (call.tokens(), call.spec.head_dim);
    stage.load(&state)?;
    let placed = Placed::new(call, &sides, stage)?;
    let proj = |side: &Side| {
        let width = side.num_heads * side.stride;
        stage.rows("proj", [capacity, width], &side.proj)
    };
    let d_proj = |side: &Side| stage.out("d_proj", &[capacity, side.num_heads * side.stride]);
    let d_out = |side: &Side| {
        let width = side.num_heads * head_dim;
        stage.rows("d_out", [capacity, width], &side.d_out)
    };
    let rstd = |side: &Side| {
        let values: Vec<f32> = side.rstd(call).iter().map(|rstd| *rstd as f32).collect();
        stage.rows_f32("rstd", [capacity, side.num_heads], &values)
    };
    let [q, k] = &sides;
    let (mut d_q_proj, mut d_k_proj) = (d_proj(q)?, d_proj(k)?);
    stage.ops.qk_norm_rope_backward(
        &mut d_q_proj,
        &mut d_k_proj,
        &d_out(q)?,
        &d_out(k)?,
        &proj(q)?,
        &proj(k)?,
        &rstd(q)?,
        &rstd(k)?,
        placed.weights(),
        call.spec,
        &state,
    )?;
    // Of each head of d_q_proj the query is written, the gate is not.
    let d_q_proj = stage.read_rows(&d_q_proj, tokens)?;
    let heads = d_q_proj.chunks(q.stride);
    let query = heads.clone().flat_map(|head| &head[..head_dim]).copied();
    let gate = heads.flat_map(|head| &head[head_dim..]);
    Ok(Outputs::new()
        .activation("d_query", query.collect())
        .activation("d_k_proj", stage.read_rows(&d_k_proj, tokens)?)
        .exact("left_alone", gate.map(|d| u32::from(d.is_nan())).collect()))
}

fn expected_backward(call: &Call) -> Outputs {
    let [q, k] = call.sides();
    let gates = call.tokens() * q.num_heads * (q.stride - call.spec.head_dim);
    Outputs::new()
        .activation("d_query", q.backward(call))
        .activation("d_k_proj", k.backward(call))
        .exact("left_alone", vec![1; gates])
}

fn case(
    op: &'static str,
    call: &Call,
    run: fn(&Call, &Stage<'_>) -> Result<Outputs>,
    expected: fn(&Call) -> Outputs,
) -> Case {
    let (runs, oracle) = (call.clone(), call.clone());
    Case::new(
        op,
        call.label(),
        move |stage| run(&runs, stage),
        move || expected(&oracle),
    )
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let both = |call: Call| {
        [
            case("qk_norm_rope_forward", &call, run_forward, expected_forward),
            case(
                "qk_norm_rope_backward",
                &call,
                run_backward,
                expected_backward,
            ),
        ]
    };
    calls().into_iter().flat_map(both).collect()
}
