//! The gated delta rule in chunks as a plain bf16 implementation has it: every matrix product stores its result in bf16; gates,
//! the inverse and the running state are wider. How far it is from the recurrence is what devices are allowed, twice.

use super::{Grads, Inputs};

const CHUNK: usize = 64;

fn rounded(x: f64) -> f64 {
    half::bf16::from_f64(x).to_f64()
}

/// A dense matrix.
#[derive(Debug, Clone)]
struct Matrix {
    rows: usize,
    columns: usize,
    data: Vec<f64>,
}

impl Matrix {
    fn new(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let at = |i: usize| value(i / columns, i % columns);
        let data = (0..rows * columns).map(at).collect();
        Self {
            rows,
            columns,
            data,
        }
    }

    fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, |_, _| 0.0)
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.data[row * self.columns + column]
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.columns..(row + 1) * self.columns]
    }

    fn map(&self, f: impl Fn(f64, usize, usize) -> f64) -> Self {
        Self::new(self.rows, self.columns, |i, j| f(self.at(i, j), i, j))
    }

    fn bf16(&self) -> Self {
        self.map(|x, _, _| rounded(x))
    }

    fn t(&self) -> Self {
        Self::new(self.columns, self.rows, |i, j| self.at(j, i))
    }

    fn times(&self, other: &Self) -> Self {
        let mut out = Self::zeros(self.rows, other.columns);
        for i in 0..self.rows {
            for (k, factor) in self.row(i).iter().enumerate() {
                let target = &mut out.data[i * other.columns..(i + 1) * other.columns];
                for (out, value) in target.iter_mut().zip(other.row(k)) {
                    *out += factor * value;
                }
            }
        }
        out
    }

    fn plus(&self, other: &Self) -> Self {
        self.map(|x, i, j| x + other.at(i, j))
    }

    fn minus(&self, other: &Self) -> Self {
        self.map(|x, i, j| x - other.at(i, j))
    }

    fn scaled(&self, factor: f64) -> Self {
        self.map(|x, _, _| x * factor)
    }

    /// Row `i` times `factors[i]`.
    fn scaled_rows(&self, factors: &[f64]) -> Self {
        self.map(|x, i, _| x * factors[i])
    }

    /// Dot products of rows.
    fn row_dots(&self, other: &Self) -> Vec<f64> {
        let dot = |i| {
            let terms = self.row(i).iter().zip(other.row(i));
            terms.map(|(a, b)| a * b).sum()
        };
        (0..self.rows).map(dot).collect()
    }
}

/// A chunk of a value head, with what does not depend on the state.
struct Chunk {
    first: usize,
    /// Unit rows, q also times `1 / sqrt(dk)`.
    q: Matrix,
    k: Matrix,
    v: Matrix,
    q_rstd: Vec<f64>,
    k_rstd: Vec<f64>,
    beta: Vec<f64>,
    /// `e^gamma`.
    exp_gamma: Vec<f64>,
    /// `e^(gamma_C - gamma)`.
    to_end: Vec<f64>,
    decay: Matrix,
    inverse: Matrix,
    w: Matrix,
    u: Matrix,
    scores: Matrix,
}

impl Chunk {
    fn new(inputs: &Inputs, head: usize, first: usize, size: usize) -> Self {
        let (spec, heads) = (&inputs.spec, inputs.spec.num_value_heads);
        let (dk, dv) = (spec.key_head_dim, spec.value_head_dim);
        let key = head / spec.ratio() * dk;
        let u = |column: usize, width: usize| {
            let at = |i, j| f64::from(inputs.u[(first + i) * spec.conv_dim() + column + j]);
            Matrix::new(size, width, at)
        };
        let unit = |x: Matrix| {
            let sums = x.row_dots(&x);
            let rstd: Vec<f64> = sums.iter().map(|sum| 1.0 / (sum + 1e-6).sqrt()).collect();
            (x.scaled_rows(&rstd), rstd)
        };
        let (q, q_rstd) = unit(u(key, dk));
        let (k, k_rstd) = unit(u(spec.key_dim() + key, dk));
        let (q, k) = (q.scaled(1.0 / (dk as f64).sqrt()).bf16(), k.bf16());
        let v = u(2 * spec.key_dim() + head * dv, dv);
        let gates = |values: &[f32]| -> Vec<f64> {
            let rows = first..first + size;
            rows.map(|t| f64::from(values[t * heads + head])).collect()
        };
        let (g, beta) = (gates(&inputs.g), gates(&inputs.beta));
        let gamma: Vec<f64> = g
            .iter()
            .scan(0.0, |sum, g| {
                *sum += g;
                Some(*sum)
            })
            .collect();
        let decay = Matrix::new(size, size, |i, j| {
            if j <= i {
                (gamma[i] - gamma[j]).exp()
            } else {
                0.0
            }
        });
        let exp_gamma: Vec<f64> = gamma.iter().map(|x| x.exp()).collect();
        let to_end = gamma.iter().map(|x| (gamma[size - 1] - x).exp()).collect();
        let products = k.times(&k.t());
        let lower = Matrix::new(size, size, |i, j| {
            if j < i {
                beta[i] * products.at(i, j) * decay.at(i, j)
            } else {
                0.0
            }
        });
        let inverse = inverse(&lower).bf16();
        let factors: Vec<f64> = beta.iter().zip(&exp_gamma).map(|(b, e)| b * e).collect();
        Self {
            first,
            w: inverse.times(&k.scaled_rows(&factors).bf16()).bf16(),
            u: inverse.times(&v.scaled_rows(&beta).bf16()).bf16(),
            scores: q.times(&k.t()).map(|x, i, j| x * decay.at(i, j)).bf16(),
            q,
            k,
            v,
            q_rstd,
            k_rstd,
            beta,
            exp_gamma,
            to_end,
            decay,
            inverse,
        }
    }

    fn kept(&self) -> f64 {
        self.exp_gamma[self.exp_gamma.len() - 1]
    }

    /// `V'`, from the state before.
    fn values(&self, state: &Matrix) -> Matrix {
        self.u.minus(&self.w.times(&state.bf16())).bf16()
    }

    /// The state after.
    fn advance(&self, state: &Matrix) -> Matrix {
        let written = self.values(state).scaled_rows(&self.to_end).bf16();
        state.scaled(self.kept()).plus(&self.k.t().times(&written))
    }

    fn output(&self, state: &Matrix) -> Matrix {
        let q = self.q.scaled_rows(&self.exp_gamma).bf16();
        let within = self.scores.times(&self.values(state));
        q.times(&state.bf16()).plus(&within).bf16()
    }
}

/// `(I + L)^-1`, by forward substitution.
fn inverse(lower: &Matrix) -> Matrix {
    let mut out = Matrix::new(lower.rows, lower.rows, |i, j| f64::from(u8::from(i == j)));
    for i in 0..lower.rows {
        for j in 0..i {
            let sum: f64 = (j..i).map(|m| lower.at(i, m) * out.at(m, j)).sum();
            out.data[i * lower.rows + j] = -sum;
        }
    }
    out
}

/// The chunks of a sequence, each with the state before it.
fn chunks(inputs: &Inputs, start: usize, end: usize, head: usize) -> Vec<(Chunk, Matrix)> {
    let spec = &inputs.spec;
    let mut state = Matrix::zeros(spec.key_head_dim, spec.value_head_dim);
    let chunk = |first: usize| {
        let chunk = Chunk::new(inputs, head, first, CHUNK.min(end - first));
        let after = chunk.advance(&state);
        (chunk, std::mem::replace(&mut state, after))
    };
    (start..end).step_by(CHUNK).map(chunk).collect()
}

/// `target[(first + i) stride + column + j] += part[i, j]`.
fn add(target: &mut [f64], stride: usize, first: usize, column: usize, part: &Matrix) {
    for i in 0..part.rows {
        let row = &mut target[(first + i) * stride + column..][..part.columns];
        row.iter_mut()
            .zip(part.row(i))
            .for_each(|(target, value)| *target += value);
    }
}

pub(super) fn forward(inputs: &Inputs) -> Vec<f64> {
    let (spec, dv) = (&inputs.spec, inputs.spec.value_head_dim);
    let mut o = vec![0.0; inputs.state.num_tokens() * spec.value_dim()];
    for (start, end) in inputs.state.sequences() {
        for head in 0..spec.num_value_heads {
            for (chunk, state) in chunks(inputs, start, end, head) {
                let part = chunk.output(&state);
                add(&mut o, spec.value_dim(), chunk.first, head * dv, &part);
            }
        }
    }
    o
}

pub(super) fn backward(inputs: &Inputs) -> Grads {
    let spec = &inputs.spec;
    let mut grads = Grads::zeros(inputs);
    for (start, end) in inputs.state.sequences() {
        for head in 0..spec.num_value_heads {
            let mut d_state = Matrix::zeros(spec.key_head_dim, spec.value_head_dim);
            for (chunk, state) in chunks(inputs, start, end, head).iter().rev() {
                d_state = chunk_backward(inputs, &mut grads, chunk, state, &d_state, head);
            }
        }
    }
    grads.d_u = grads.d_u.into_iter().map(rounded).collect();
    grads
}

/// Adds the chunk's gradients, by the formulas of `docs/math/gated_delta.md`; returns that of the state before it.
fn chunk_backward(
    inputs: &Inputs,
    grads: &mut Grads,
    chunk: &Chunk,
    state: &Matrix,
    d_state: &Matrix,
    head: usize,
) -> Matrix {
    let (spec, heads) = (&inputs.spec, inputs.spec.num_value_heads);
    let (size, dv) = (chunk.k.rows, spec.value_head_dim);
    let (q, k, v) = (&chunk.q, &chunk.k, &chunk.v);
    let d_o = Matrix::new(size, dv, |i, j| {
        f64::from(inputs.d_o[(chunk.first + i) * spec.value_dim() + head * dv + j])
    });
    let (s, d_s) = (state.bf16(), d_state.bf16());
    let values = chunk.values(state);
    let local = chunk.scores.t().times(&d_o).bf16();
    let k_to_end = k.scaled_rows(&chunk.to_end).bf16();
    let d_values = local.plus(&k_to_end.times(&d_s)).bf16();
    let q_decayed = q.scaled_rows(&chunk.exp_gamma).bf16();
    let before = d_state
        .scaled(chunk.kept())
        .plus(&q_decayed.t().times(&d_o))
        .minus(&chunk.w.t().times(&d_values));

    let p = d_o.times(&values.t());
    let p = p.map(|x, i, j| x * chunk.decay.at(i, j)).bf16();
    let d_o_decayed = d_o.scaled_rows(&chunk.exp_gamma).bf16();
    let d_q = d_o_decayed.times(&s.t()).plus(&p.times(k)).bf16();
    let d_k0 = values.scaled_rows(&chunk.to_end).bf16().times(&d_s.t());
    let mut d_k = d_k0.plus(&p.t().times(q)).bf16();
    let along_q = d_q.row_dots(q);
    let mut d_gamma: Vec<f64> = along_q
        .iter()
        .zip(d_k.row_dots(k))
        .map(|(q, k)| q - k)
        .collect();
    d_gamma[size - 1] += chunk.kept() * s.row_dots(&d_s).iter().sum::<f64>();
    d_gamma[size - 1] += d_k0.row_dots(k).iter().sum::<f64>();

    // Through W and U.
    let solved = chunk.inverse.t();
    let x = solved
        .times(&d_values.times(&s.t()).scaled(-1.0).bf16())
        .bf16();
    let y = solved.times(&d_values).bf16();
    let factors = chunk.beta.iter().zip(&chunk.exp_gamma);
    let factors: Vec<f64> = factors.map(|(beta, e)| beta * e).collect();
    let e = x.times(&chunk.w.t()).plus(&y.times(&chunk.u.t()));
    let below = |x: f64, i: usize, j: usize| {
        if j < i {
            -x * chunk.decay.at(i, j)
        } else {
            0.0
        }
    };
    let e = e.map(below).bf16();
    let e_k = e.times(k).bf16();
    let products = k.times(&k.t());
    let (x_dot_k, y_dot_v) = (x.row_dots(k), y.row_dots(v));
    let e_k_dot_k = e_k.row_dots(k);
    for i in 0..size {
        d_gamma[i] += factors[i] * x_dot_k[i];
        for j in 0..i {
            let m = e.at(i, j) * chunk.beta[i] * products.at(i, j);
            d_gamma[i] += m;
            d_gamma[j] -= m;
        }
        grads.d_beta[(chunk.first + i) * heads + head] =
            chunk.exp_gamma[i] * x_dot_k[i] + y_dot_v[i] + e_k_dot_k[i];
    }
    d_k = d_k
        .plus(&x.scaled_rows(&factors))
        .plus(&e_k.scaled_rows(&chunk.beta))
        .plus(&e.t().times(&k.scaled_rows(&chunk.beta).bf16()))
        .bf16();
    let mut sum = 0.0;
    for (i, d_gamma) in d_gamma.iter().enumerate().rev() {
        sum += d_gamma;
        grads.d_g[(chunk.first + i) * heads + head] = sum;
    }

    let key = head / spec.ratio() * spec.key_head_dim;
    let scale = 1.0 / (spec.key_head_dim as f64).sqrt();
    let d_q = unit_backward(&d_q, q, &chunk.q_rstd, scale);
    let d_k = unit_backward(&d_k, k, &chunk.k_rstd, 1.0);
    let (width, key_dim) = (spec.conv_dim(), spec.key_dim());
    add(&mut grads.d_u, width, chunk.first, key, &d_q);
    add(&mut grads.d_u, width, chunk.first, key_dim + key, &d_k);
    let value = 2 * key_dim + head * dv;
    let d_v = y.scaled_rows(&chunk.beta);
    add(&mut grads.d_u, width, chunk.first, value, &d_v);
    before
}

/// `rstd (d - yh <yh, d>)` by rows, of `y = scale x rstd`, `yh = y / scale`, from the gradient of `y`.
fn unit_backward(d: &Matrix, y: &Matrix, rstd: &[f64], scale: f64) -> Matrix {
    let along = d.row_dots(y);
    d.map(|d, i, j| rstd[i] * (scale * d - y.at(i, j) * along[i] / scale))
}
