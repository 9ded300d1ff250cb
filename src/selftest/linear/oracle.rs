//! What linear layers must give: loops in f64, written apart from the CPU's.

use super::super::Outputs;
use super::super::stage::nf4_values;
use super::{Call, Dense, Gradient, Nested, Plain};
use crate::ops::LoraPair;

impl Call {
    /// Whether dropout keeps column `col` of token `row` for `pair`, and the factor of what is kept.
    fn keep(&self, pair: &LoraPair, row: usize, col: usize) -> f64 {
        let Some(dropout) = self.dropout_state().filter(|_| pair.dropout > 0.0) else {
            return 1.0;
        };
        let index = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let words = dropout.words(pair.module, index(row), index(col / 4));
        let share = f64::from(words[col % 4]) / 4_294_967_296.0;
        if share < f64::from(pair.dropout) {
            0.0
        } else {
            1.0 / (1.0 - f64::from(pair.dropout))
        }
    }

    /// The weight of a projection.
    fn exact_weight(&self, index: usize) -> Matrix {
        let p = self.projections[index];
        let shape = [p.out_features, self.in_features];
        let values = self.weight_values(index);
        let values = match p.kind {
            Dense => values,
            Plain | Nested => nf4_values(shape, &values, p.kind == Nested).unwrap_or_default(),
        };
        Matrix::new(shape[1], &values)
    }

    fn oracle(&self) -> Oracle {
        let tokens = self.num_tokens();
        let (pairs, _) = self.pairs();
        let arena = self.arena();
        let x = Matrix::new(self.in_features, &self.x());
        let mut xa = Matrix::zeros(tokens, self.total_rank());
        let mut outs = Vec::new();
        let mut first = 0;
        for (index, p) in self.projections.iter().enumerate() {
            let w = self.exact_weight(index);
            let bias = self.bias_values(index);
            let mut out = Matrix::zeros(tokens, p.out_features);
            let pair = pairs[index];
            let (a, b) = pair.map_or_else(Default::default, |pair| {
                let a = Matrix::new(self.in_features, &arena[pair.a_range()]);
                (a, Matrix::new(pair.rank, &arena[pair.b_range()]))
            });
            for t in 0..tokens {
                for r in 0..p.rank {
                    let pair = pair.as_ref();
                    let terms = (0..self.in_features).map(|k| {
                        x.at(t, k) * pair.map_or(0.0, |pair| self.keep(pair, t, k)) * a.at(r, k)
                    });
                    *xa.at_mut(t, first + r) = terms.sum();
                }
                for n in 0..p.out_features {
                    let base: f64 = (0..self.in_features).map(|k| x.at(t, k) * w.at(n, k)).sum();
                    let low: f64 = (0..p.rank).map(|r| xa.at(t, first + r) * b.at(n, r)).sum();
                    let scaling = pair.map_or(0.0, |pair| f64::from(pair.scaling));
                    let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
                    *out.at_mut(t, n) = base + scaling * low + bias;
                }
            }
            first += p.rank;
            outs.push(out.values);
        }
        Oracle {
            xa: xa.values,
            outs,
        }
    }

    pub(super) fn forward_oracle(&self) -> Outputs {
        let oracle = self.oracle();
        let mut outputs = Outputs::new().activation("xa", oracle.xa);
        for (out, p) in oracle.outs.into_iter().zip(&self.projections) {
            outputs = if p.f32_output {
                outputs.f32("out", out)
            } else {
                outputs.activation("out", out)
            };
        }
        outputs
    }

    pub(super) fn swiglu_oracle(&self) -> Outputs {
        let oracle = self.oracle();
        let h = oracle.outs[0].iter().zip(&oracle.outs[1]);
        let h = h.map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
        Outputs::new()
            .activation("xa", oracle.xa)
            .activation("gate", oracle.outs[0].clone())
            .activation("up", oracle.outs[1].clone())
            .activation("h", h.collect())
    }

    pub(super) fn backward_oracle(&self) -> Outputs {
        let tokens = self.num_tokens();
        let (pairs, _) = self.pairs();
        let arena = self.arena();
        let x = Matrix::new(self.in_features, &self.x());
        let xa = Matrix::new(self.total_rank(), &self.xa());
        let mut d_x = match self.gradient {
            Gradient::Add => Matrix::new(self.in_features, &self.d_x_before()),
            Gradient::Skip | Gradient::Overwrite => Matrix::zeros(tokens, self.in_features),
        };
        let mut d_lora: Vec<f64> = self.d_lora_before().into_iter().map(f64::from).collect();
        let mut first = 0;
        for (index, p) in self.projections.iter().enumerate() {
            let w = self.exact_weight(index);
            let d_out = Matrix::new(p.out_features, &self.d_out(index));
            for t in 0..tokens {
                for k in 0..self.in_features {
                    let terms = (0..p.out_features).map(|n| d_out.at(t, n) * w.at(n, k));
                    *d_x.at_mut(t, k) += terms.sum::<f64>();
                }
            }
            let Some(pair) = pairs[index] else {
                continue;
            };
            let scaling = f64::from(pair.scaling);
            let a = Matrix::new(self.in_features, &arena[pair.a_range()]);
            let b = Matrix::new(pair.rank, &arena[pair.b_range()]);
            for t in 0..tokens {
                let d_xa: Vec<f64> = (0..pair.rank)
                    .map(|r| {
                        let terms = (0..p.out_features).map(|n| d_out.at(t, n) * b.at(n, r));
                        scaling * terms.sum::<f64>()
                    })
                    .collect();
                for k in 0..self.in_features {
                    let keep = self.keep(&pair, t, k);
                    for (r, d_xa) in d_xa.iter().enumerate() {
                        *d_x.at_mut(t, k) += keep * d_xa * a.at(r, k);
                        d_lora[pair.a + r * self.in_features + k] += d_xa * keep * x.at(t, k);
                    }
                }
                for n in 0..p.out_features {
                    for r in 0..pair.rank {
                        d_lora[pair.b + n * pair.rank + r] +=
                            scaling * d_out.at(t, n) * xa.at(t, first + r);
                    }
                }
            }
            first += p.rank;
        }
        let mut outputs = Outputs::new();
        if self.gradient != Gradient::Skip {
            outputs = outputs.activation("d_x", d_x.values);
        }
        self.grad_outputs(outputs, &d_lora)
    }
}

/// What [`Call::oracle`] computes.
struct Oracle {
    xa: Vec<f64>,
    outs: Vec<Vec<f64>>,
}

/// Row-major f64.
#[derive(Default)]
struct Matrix {
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn new(cols: usize, values: &[f32]) -> Self {
        let values = values.iter().copied().map(f64::from).collect();
        Self { cols, values }
    }

    fn zeros(rows: usize, cols: usize) -> Self {
        let values = vec![0.0; rows * cols];
        Self { cols, values }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }

    fn at_mut(&mut self, row: usize, col: usize) -> &mut f64 {
        &mut self.values[row * self.cols + col]
    }
}
