//! The gated delta rule token by token, in f64: the definition, and its derivative by hand.

use super::{Grads, Inputs};

/// `x / sqrt(sum x^2 + 1e-6)`, and the factor.
fn unit(x: &[f32]) -> (Vec<f64>, f64) {
    let sum: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let rstd = 1.0 / (sum + 1e-6).sqrt();
    (x.iter().map(|x| f64::from(*x) * rstd).collect(), rstd)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// One token of a value head: unit q and k, v, and the state as it goes.
struct Token {
    q: Vec<f64>,
    q_rstd: f64,
    k: Vec<f64>,
    k_rstd: f64,
    beta: f64,
    decay: f64,
    /// `v - S^T k` of the decayed state.
    error: Vec<f64>,
    /// `[dk, dv]`, after the decay.
    decayed: Vec<f64>,
    /// `[dk, dv]`, after the token.
    after: Vec<f64>,
}

impl Inputs {
    fn unit_at(&self, token: usize, column: usize) -> (Vec<f64>, f64) {
        let row = token * self.spec.conv_dim() + column;
        unit(&self.u[row..row + self.spec.key_head_dim])
    }

    /// The tokens of a sequence, for a value head.
    fn tokens(&self, start: usize, end: usize, head: usize) -> Vec<Token> {
        let (spec, heads) = (&self.spec, self.spec.num_value_heads);
        let (dk, dv) = (spec.key_head_dim, spec.value_head_dim);
        let key_column = head / spec.ratio() * dk;
        let mut state = vec![0.0; dk * dv];
        let token = |t: usize| {
            let (q, q_rstd) = self.unit_at(t, key_column);
            let (k, k_rstd) = self.unit_at(t, spec.key_dim() + key_column);
            let beta = f64::from(self.beta[t * heads + head]);
            let decay = f64::from(self.g[t * heads + head]).exp();
            state.iter_mut().for_each(|s| *s *= decay);
            let decayed = state.clone();
            let v = &self.u[t * spec.conv_dim() + 2 * spec.key_dim() + head * dv..][..dv];
            let mut error: Vec<f64> = v.iter().map(|v| f64::from(*v)).collect();
            for (k, row) in k.iter().zip(decayed.chunks(dv)) {
                error.iter_mut().zip(row).for_each(|(e, s)| *e -= k * s);
            }
            for (k, row) in k.iter().zip(state.chunks_mut(dv)) {
                row.iter_mut()
                    .zip(&error)
                    .for_each(|(s, e)| *s += k * beta * e);
            }
            Token {
                q,
                q_rstd,
                k,
                k_rstd,
                beta,
                decay,
                error,
                decayed,
                after: state.clone(),
            }
        };
        (start..end).map(token).collect()
    }

    /// `1 / sqrt(dk)`.
    fn scale(&self) -> f64 {
        1.0 / (self.spec.key_head_dim as f64).sqrt()
    }
}

pub(super) fn forward(inputs: &Inputs) -> Vec<f64> {
    let (spec, dv) = (&inputs.spec, inputs.spec.value_head_dim);
    let mut o = vec![0.0; inputs.state.num_tokens() * spec.value_dim()];
    for (start, end) in inputs.state.sequences() {
        for head in 0..spec.num_value_heads {
            for (t, token) in inputs.tokens(start, end, head).iter().enumerate() {
                let out = &mut o[(start + t) * spec.value_dim() + head * dv..][..dv];
                for (q, row) in token.q.iter().zip(token.after.chunks(dv)) {
                    out.iter_mut()
                        .zip(row)
                        .for_each(|(o, s)| *o += q * inputs.scale() * s);
                }
            }
        }
    }
    o
}

pub(super) fn backward(inputs: &Inputs) -> Grads {
    let mut grads = Grads::zeros(inputs);
    for (start, end) in inputs.state.sequences() {
        for head in 0..inputs.spec.num_value_heads {
            let tokens = inputs.tokens(start, end, head);
            let mut d_state = vec![0.0; tokens[0].after.len()];
            for (t, token) in tokens.iter().enumerate().rev() {
                token_backward(inputs, &mut grads, &mut d_state, token, start + t, head);
            }
        }
    }
    grads
}

/// Adds token `t`'s gradients; `d_state` comes in as that of the state after it and leaves as that of the state before.
fn token_backward(
    inputs: &Inputs,
    grads: &mut Grads,
    d_state: &mut [f64],
    token: &Token,
    t: usize,
    head: usize,
) {
    let (spec, dv) = (&inputs.spec, inputs.spec.value_head_dim);
    let d_o: Vec<f64> = inputs.d_o[t * spec.value_dim() + head * dv..][..dv]
        .iter()
        .map(|d| f64::from(*d))
        .collect();
    // o = S^T q s.
    let mut d_q = Vec::new();
    for ((row, d_row), q) in token
        .after
        .chunks(dv)
        .zip(d_state.chunks_mut(dv))
        .zip(&token.q)
    {
        d_q.push(inputs.scale() * dot(row, &d_o));
        d_row
            .iter_mut()
            .zip(&d_o)
            .for_each(|(d, d_o)| *d += q * inputs.scale() * d_o);
    }
    // S = decayed + k (beta error)^T.
    let mut d_delta = vec![0.0; dv];
    let mut d_k = Vec::new();
    for (d_row, k) in d_state.chunks(dv).zip(&token.k) {
        d_delta.iter_mut().zip(d_row).for_each(|(d, s)| *d += k * s);
        d_k.push(token.beta * dot(d_row, &token.error));
    }
    let d_v: Vec<f64> = d_delta.iter().map(|d| token.beta * d).collect();
    // error = v - decayed^T k, decayed = e^g S.
    let mut d_g = 0.0;
    for (((d_row, row), k), d_k) in d_state
        .chunks_mut(dv)
        .zip(token.decayed.chunks(dv))
        .zip(&token.k)
        .zip(&mut d_k)
    {
        d_row
            .iter_mut()
            .zip(&d_v)
            .for_each(|(d, d_v)| *d -= k * d_v);
        *d_k -= dot(row, &d_v);
        d_g += dot(d_row, row);
        d_row.iter_mut().for_each(|d| *d *= token.decay);
    }
    let gate = t * spec.num_value_heads + head;
    grads.d_g[gate] = d_g;
    grads.d_beta[gate] = dot(&d_delta, &token.error);
    let row = t * spec.conv_dim();
    let key = row + head / spec.ratio() * spec.key_head_dim;
    let value = row + 2 * spec.key_dim() + head * dv;
    unit_backward(&mut grads.d_u[key..], &d_q, &token.q, token.q_rstd);
    let key = key + spec.key_dim();
    unit_backward(&mut grads.d_u[key..], &d_k, &token.k, token.k_rstd);
    grads.d_u[value..value + dv].copy_from_slice(&d_v);
}

/// `d_x += rstd (d - y <y, d>)` of `y = x rstd`.
fn unit_backward(d_x: &mut [f64], d: &[f64], y: &[f64], rstd: f64) {
    let along = dot(d, y);
    for ((d_x, d), y) in d_x.iter_mut().zip(d).zip(y) {
        *d_x += rstd * (d - y * along);
    }
}
