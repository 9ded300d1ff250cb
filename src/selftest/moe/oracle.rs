//! The experts in f64, one element at a time.

use super::{Shape, Wanted};
use crate::ops::{DropoutState, LoraPair};
use crate::selftest::Outputs;
use crate::selftest::stage::values;

/// Nothing is rounded.
pub(super) fn exact(value: f64) -> f64 {
    value
}

/// Rounded as a plain implementation in bf16 would.
pub(super) fn to_bf16(value: f64) -> f64 {
    half::bf16::from_f64(value).to_f64()
}

/// A case's reference; `round` is applied to what an implementation would store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Oracle {
    pub(super) shape: Shape,
    pub(super) round: fn(f64) -> f64,
}

/// One projection of one expert.
struct Projection {
    /// `[out_features, in_features]`.
    weight: Vec<f64>,
    out_features: usize,
    in_features: usize,
    pair: Option<LoraPair>,
    a: Vec<f64>,
    b: Vec<f64>,
    dropout: Option<DropoutState>,
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

impl Projection {
    /// Factor of the adapter's input at column `column` of `token`'s row.
    fn mask(&self, token: usize, column: usize) -> f64 {
        let (Some(pair), Some(dropout)) = (self.pair, self.dropout) else {
            return 1.0;
        };
        let p = f64::from(pair.dropout);
        let token = u32::try_from(token).unwrap_or(u32::MAX);
        let quad = u32::try_from(column / 4).unwrap_or(u32::MAX);
        let word = dropout.words(pair.module, token, quad)[column % 4];
        if f64::from(word) < p * 4_294_967_296.0 {
            0.0
        } else {
            1.0 / (1.0 - p)
        }
    }

    fn rank(&self) -> usize {
        self.pair.map_or(0, |pair| pair.rank)
    }

    fn scaling(&self) -> f64 {
        self.pair.map_or(0.0, |pair| f64::from(pair.scaling))
    }

    /// `dropout(x) A^T`.
    fn xa(&self, x: &[f64], token: usize) -> Vec<f64> {
        let dropped: Vec<f64> = (0..self.in_features)
            .map(|k| x[k] * self.mask(token, k))
            .collect();
        let row = |r| &self.a[r * self.in_features..][..self.in_features];
        (0..self.rank())
            .map(|r| row(r).iter().zip(&dropped).map(|(a, x)| a * x).sum())
            .collect()
    }

    /// `x W^T + s xa B^T`.
    fn out(&self, x: &[f64], xa: &[f64]) -> Vec<f64> {
        (0..self.out_features)
            .map(|n| {
                let row = &self.weight[n * self.in_features..][..self.in_features];
                let base: f64 = row.iter().zip(x).map(|(w, x)| w * x).sum();
                let b = &self.b[n * self.rank()..][..self.rank()];
                let low: f64 = b.iter().zip(xa).map(|(b, xa)| b * xa).sum();
                base + self.scaling() * low
            })
            .collect()
    }

    /// `s d_out B`.
    fn d_xa(&self, d_out: &[f64]) -> Vec<f64> {
        (0..self.rank())
            .map(|r| {
                let column = (0..self.out_features).map(|n| d_out[n] * self.b[n * self.rank() + r]);
                self.scaling() * column.sum::<f64>()
            })
            .collect()
    }

    /// `d_out W + mask(d_xa A)`.
    fn d_x(&self, d_out: &[f64], d_xa: &[f64], token: usize) -> Vec<f64> {
        (0..self.in_features)
            .map(|k| {
                let column = (0..self.out_features)
                    .map(|n| d_out[n] * self.weight[n * self.in_features + k]);
                let low = (0..self.rank()).map(|r| d_xa[r] * self.a[r * self.in_features + k]);
                column.sum::<f64>() + self.mask(token, k) * low.sum::<f64>()
            })
            .collect()
    }

    /// Adds one row's part of `dA` and `dB`.
    fn add_grads(
        &self,
        arena: &mut [f64],
        (x, xa): (&[f64], &[f64]),
        (d_out, d_xa): (&[f64], &[f64]),
        token: usize,
    ) {
        let Some(pair) = self.pair else { return };
        for r in 0..pair.rank {
            for k in 0..self.in_features {
                arena[pair.a + r * self.in_features + k] += d_xa[r] * x[k] * self.mask(token, k);
            }
            for n in 0..self.out_features {
                arena[pair.b + n * pair.rank + r] += self.scaling() * d_out[n] * xa[r];
            }
        }
    }
}

impl Oracle {
    fn rounded(&self, values: Vec<f64>) -> Vec<f64> {
        values.into_iter().map(self.round).collect()
    }

    fn projection(&self, which: usize, expert: usize) -> Projection {
        let shape = self.shape;
        let [out_features, in_features] = shape.dims()[which];
        let lora = shape.lora();
        let pair = lora.of([lora.gate, lora.up, lora.down][which], expert);
        let arena = self.rounded(wide(&shape.arena(2)));
        let part = |range: Option<std::ops::Range<usize>>| {
            range.map_or_else(Vec::new, |range| arena[range].to_vec())
        };
        Projection {
            weight: self.rounded(wide(&shape.weight(which, expert))),
            out_features,
            in_features,
            pair,
            a: part(pair.map(|pair| pair.a_range())),
            b: part(pair.map(|pair| pair.b_range())),
            dropout: shape.state().dropout.filter(|_| shape.dropout > 0.0),
        }
    }

    /// Each expert's projections.
    fn projections(&self, which: usize) -> Vec<Projection> {
        (0..self.shape.num_experts)
            .map(|expert| self.projection(which, expert))
            .collect()
    }

    /// `(expert, token, slot)` of each routed row.
    fn rows(&self) -> Vec<(usize, usize, usize)> {
        let ids = self.shape.ids();
        let place = |slot: usize| (ids[slot], slot / self.shape.top_k, slot);
        self.shape.slots().into_iter().map(place).collect()
    }

    pub(super) fn gate_up_forward(&self) -> Outputs {
        let shape = self.shape;
        let (gates, ups) = (self.projections(0), self.projections(1));
        let x = wide(&values(shape.tokens * shape.hidden, 1));
        let (mut h, mut gate, mut up, mut xa) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (expert, token, _) in self.rows() {
            let x = &x[token * shape.hidden..][..shape.hidden];
            let (gate_xa, up_xa) = (gates[expert].xa(x, token), ups[expert].xa(x, token));
            let g = gates[expert].out(x, &gate_xa);
            let u = ups[expert].out(x, &up_xa);
            h.extend(g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u));
            gate.extend(g);
            up.extend(u);
            xa.extend(gate_xa);
            xa.extend(up_xa);
        }
        Outputs::new()
            .activation("h", h)
            .activation("gate", gate)
            .activation("up", up)
            .activation("xa", xa)
    }

    pub(super) fn gate_up_backward(&self, wanted: Wanted) -> Outputs {
        let shape = self.shape;
        let (width, hidden) = (shape.width, shape.hidden);
        let (gates, ups) = (self.projections(0), self.projections(1));
        let x = wide(&values(shape.tokens * hidden, 1));
        let routed = |width, seed| wide(&shape.routed_values(width, seed));
        let (gate, up, d_h) = (routed(width, 3), routed(width, 4), routed(width, 6));
        let rank = shape.lora().gate_up_rank();
        let xa = routed(rank, 5);
        let mut d_lora = wide(&shape.arena(7));
        let mut d_x = match wanted {
            Wanted::Add => wide(&values(shape.tokens * hidden, 8)),
            Wanted::Overwrite => vec![0.0; shape.tokens * hidden],
            Wanted::Skip => Vec::new(),
        };
        let (mut d_gates, mut d_ups) = (Vec::new(), Vec::new());
        for (row, (expert, token, _)) in self.rows().into_iter().enumerate() {
            let own = |all: &[f64]| all[row * width..][..width].to_vec();
            let (g, u, d_h) = (own(&gate), own(&up), own(&d_h));
            let sigmoid: Vec<f64> = g.iter().map(|g| 1.0 / (1.0 + (-g).exp())).collect();
            let d_gate: Vec<f64> = (0..width)
                .map(|i| d_h[i] * u[i] * sigmoid[i] * (1.0 + g[i] * (1.0 - sigmoid[i])))
                .collect();
            let d_up: Vec<f64> = (0..width).map(|i| d_h[i] * g[i] * sigmoid[i]).collect();
            let x = &x[token * hidden..][..hidden];
            let (gate_xa, up_xa) = xa[row * rank..][..rank].split_at(gates[expert].rank());
            for (side, d_out, xa) in [
                (&gates[expert], &d_gate, gate_xa),
                (&ups[expert], &d_up, up_xa),
            ] {
                let d_xa = side.d_xa(d_out);
                side.add_grads(&mut d_lora, (x, xa), (d_out, &d_xa), token);
                if wanted != Wanted::Skip {
                    let part = side.d_x(d_out, &d_xa, token);
                    let to = &mut d_x[token * hidden..][..hidden];
                    to.iter_mut().zip(part).for_each(|(to, part)| *to += part);
                }
            }
            d_gates.extend(d_gate);
            d_ups.extend(d_up);
        }
        Outputs::new()
            .activation("d_gate", d_gates)
            .activation("d_up", d_ups)
            .f32("d_lora", d_lora)
            .activation("d_x", d_x)
    }

    pub(super) fn down_forward(&self) -> Outputs {
        let shape = self.shape;
        let downs = self.projections(2);
        let h = wide(&shape.routed_values(shape.width, 1));
        let weights = wide(&shape.topk_weights());
        let mut out = vec![0.0; shape.tokens * shape.hidden];
        let mut xas = Vec::new();
        for (row, (expert, token, slot)) in self.rows().into_iter().enumerate() {
            let h = &h[row * shape.width..][..shape.width];
            let xa = downs[expert].xa(h, token);
            let own = downs[expert].out(h, &xa);
            let to = &mut out[token * shape.hidden..][..shape.hidden];
            to.iter_mut()
                .zip(own)
                .for_each(|(to, own)| *to += weights[slot] * own);
            xas.extend(xa);
        }
        Outputs::new().activation("out", out).activation("xa", xas)
    }

    pub(super) fn down_backward(&self) -> Outputs {
        let shape = self.shape;
        let (width, rank) = (shape.width, shape.lora().down_rank());
        let downs = self.projections(2);
        let h = wide(&shape.routed_values(width, 1));
        let xa = wide(&shape.routed_values(rank, 5));
        let d_out = wide(&values(shape.tokens * shape.hidden, 3));
        let weights = wide(&shape.topk_weights());
        let mut d_lora = wide(&shape.arena(7));
        let mut d_weights = vec![0.0; shape.routed()];
        let mut d_hs = Vec::new();
        for (row, (expert, token, slot)) in self.rows().into_iter().enumerate() {
            let d_out = &d_out[token * shape.hidden..][..shape.hidden];
            let (h, xa) = (&h[row * width..][..width], &xa[row * rank..][..rank]);
            let down = &downs[expert];
            let d_xa = self.rounded(down.d_xa(d_out));
            let delta = down.d_x(d_out, &d_xa, token);
            d_weights[slot] = delta.iter().zip(h).map(|(d, h)| d * h).sum();
            let weighted = |values: &[f64]| -> Vec<f64> {
                let products = values.iter().map(|value| weights[slot] * value);
                products.map(self.round).collect()
            };
            d_hs.extend(weighted(&delta));
            let (d_out, d_xa) = (weighted(d_out), weighted(&d_xa));
            down.add_grads(&mut d_lora, (h, xa), (&d_out, &d_xa), token);
        }
        Outputs::new()
            .activation("d_h", d_hs)
            .f32("d_topk_weights", d_weights)
            .f32("d_lora", d_lora)
    }
}
