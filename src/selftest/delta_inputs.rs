//! Cases of `delta_inputs`.

use super::stage::{scaled, state, values};
use super::{Case, Outputs, Stage};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A layer of `num_key_heads` by `ratio` heads; 16 wide keys keep the rows short.
fn spec(num_key_heads: usize, ratio: usize, dv: usize, taps: usize) -> DeltaSpec {
    DeltaSpec {
        num_key_heads,
        num_value_heads: num_key_heads * ratio,
        key_head_dim: 16,
        value_head_dim: dv,
        conv_kernel_dim: taps,
        eps: 1e-6,
    }
}

/// Inputs of the convolution.
struct Conv {
    spec: DeltaSpec,
    state: StepState,
    capacity: usize,
    qkvz: Vec<f32>,
    weight: Vec<f32>,
    d_u: Vec<f32>,
}

impl Conv {
    fn new(spec: DeltaSpec, lengths: &[usize], capacity: usize) -> Self {
        let state = state(lengths, 100, 1);
        let tokens = state.num_tokens();
        Self {
            qkvz: values(tokens * spec.qkvz_dim(), 2),
            weight: scaled(spec.conv_dim() * spec.conv_kernel_dim, 3, 0.5),
            d_u: values(tokens * spec.conv_dim(), 4),
            spec,
            state,
            capacity,
        }
    }

    fn run_forward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (spec, rows) = (self.spec, self.capacity);
        let mut u = stage.out("u", &[rows, spec.conv_dim()])?;
        let qkvz = stage.rows("qkvz", [rows, spec.qkvz_dim()], &self.qkvz)?;
        let shape = [spec.conv_dim(), spec.conv_kernel_dim];
        let weight = stage.f32("weight", &shape, &self.weight)?;
        stage
            .ops
            .causal_conv_forward(&mut u, &qkvz, &weight, spec, &self.state)?;
        Ok(Outputs::new().activation("u", stage.read_rows(&u, self.state.num_tokens())?))
    }

    fn run_backward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (spec, rows) = (self.spec, self.capacity);
        // The z columns belong to the gated norm: what is there must stay.
        let before = self.qkvz.iter().map(|x| 2.0 * x).collect::<Vec<_>>();
        let mut d_qkvz = stage.rows("d_qkvz", [rows, spec.qkvz_dim()], &before)?;
        let qkvz = stage.rows("qkvz", [rows, spec.qkvz_dim()], &self.qkvz)?;
        let d_u = stage.rows("d_u", [rows, spec.conv_dim()], &self.d_u)?;
        let shape = [spec.conv_dim(), spec.conv_kernel_dim];
        let weight = stage.f32("weight", &shape, &self.weight)?;
        stage
            .ops
            .causal_conv_backward(&mut d_qkvz, &d_u, &qkvz, &weight, spec, &self.state)?;
        let tokens = self.state.num_tokens();
        Ok(Outputs::new().activation("d_qkvz", stage.read_rows(&d_qkvz, tokens)?))
    }

    fn x(&self, token: usize, channel: usize) -> f64 {
        f64::from(self.qkvz[token * self.spec.qkvz_dim() + self.spec.qkvz_column(channel)])
    }

    fn tap(&self, channel: usize, back: usize) -> f64 {
        let taps = self.spec.conv_kernel_dim;
        f64::from(self.weight[channel * taps + taps - 1 - back])
    }

    /// For each token of each sequence and each channel, `f(start, end, token, channel)`.
    fn each(&self, mut f: impl FnMut(usize, usize, usize, usize)) {
        for (start, end) in self.state.sequences() {
            for token in start..end {
                (0..self.spec.conv_dim()).for_each(|channel| f(start, end, token, channel));
            }
        }
    }

    /// Before `SiLU`.
    fn convolved(&self, start: usize, token: usize, channel: usize) -> f64 {
        let reach = (token - start).min(self.spec.conv_kernel_dim - 1);
        let terms = (0..=reach).map(|back| self.tap(channel, back) * self.x(token - back, channel));
        terms.sum()
    }

    fn oracle_forward(&self) -> Outputs {
        let mut u = Vec::new();
        self.each(|start, _, token, channel| {
            let c = self.convolved(start, token, channel);
            u.push(c * sigmoid(c));
        });
        Outputs::new().activation("u", u)
    }

    fn oracle_backward(&self) -> Outputs {
        let spec = &self.spec;
        let mut d_qkvz: Vec<f64> = self.qkvz.iter().map(|x| 2.0 * f64::from(*x)).collect();
        self.each(|start, end, token, channel| {
            let mut sum = 0.0;
            for later in token..end.min(token + spec.conv_kernel_dim) {
                let c = self.convolved(start, later, channel);
                let slope = sigmoid(c) * (1.0 + c * (1.0 - sigmoid(c)));
                let d_u = f64::from(self.d_u[later * spec.conv_dim() + channel]);
                sum += self.tap(channel, later - token) * d_u * slope;
            }
            d_qkvz[token * spec.qkvz_dim() + spec.qkvz_column(channel)] = sum;
        });
        Outputs::new().activation("d_qkvz", d_qkvz)
    }
}

fn conv_cases() -> Vec<Case> {
    let shapes: [(&str, DeltaSpec, &[usize], usize); 7] = [
        ("one token", spec(1, 1, 16, 4), &[1], 2),
        ("31 tokens", spec(2, 2, 32, 4), &[31], 31),
        ("32 tokens, 3 taps", spec(1, 2, 16, 3), &[32], 40),
        ("33 tokens, 2 taps", spec(2, 1, 48, 2), &[33], 33),
        ("67 tokens, 8 taps", spec(1, 1, 16, 8), &[67], 100),
        ("packed", spec(2, 2, 16, 4), &[30, 1, 2, 31, 7], 80),
        ("packed, 5 taps", spec(1, 3, 32, 5), &[3, 29, 1, 1, 40], 96),
    ];
    let both = |(label, spec, lengths, capacity): (&str, DeltaSpec, &[usize], usize)| {
        let inputs = || Conv::new(spec, lengths, capacity);
        let (run, oracle) = (inputs(), inputs());
        let forward = Case::new(
            "causal_conv_forward",
            label,
            move |stage| run.run_forward(stage),
            move || oracle.oracle_forward(),
        );
        let (run, oracle) = (inputs(), inputs());
        let backward = Case::new(
            "causal_conv_backward",
            label,
            move |stage| run.run_backward(stage),
            move || oracle.oracle_backward(),
        );
        [forward, backward]
    };
    shapes.into_iter().flat_map(both).collect()
}

/// Inputs of the gates.
struct Gates {
    spec: DeltaSpec,
    state: StepState,
    capacity: usize,
    ba: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    d_g: Vec<f32>,
    d_beta: Vec<f32>,
}

impl Gates {
    fn new(spec: DeltaSpec, tokens: usize, capacity: usize) -> Self {
        let (state, heads) = (state(&[tokens], 100, 1), spec.num_value_heads);
        Self {
            // Towards both ends of sigmoid and softplus, as far as f32 keeps digits of 1 - beta.
            ba: scaled(tokens * 2 * heads, 2, 4.0),
            a_log: values(heads, 3),
            dt_bias: values(heads, 4),
            d_g: values(tokens * heads, 5),
            d_beta: values(tokens * heads, 6),
            state,
            capacity,
            spec,
        }
    }

    fn run_forward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (rows, heads) = (self.capacity, self.spec.num_value_heads);
        let mut g = stage.out_f32("g", &[rows, heads])?;
        let mut beta = stage.out_f32("beta", &[rows, heads])?;
        stage.ops.delta_gates_forward(
            &mut g,
            &mut beta,
            &stage.rows("ba", [rows, 2 * heads], &self.ba)?,
            &stage.f32("a_log", &[heads], &self.a_log)?,
            &stage.f32("dt_bias", &[heads], &self.dt_bias)?,
            self.spec,
            &self.state,
        )?;
        let tokens = self.state.num_tokens();
        Ok(Outputs::new()
            .f32("g", stage.read_rows(&g, tokens)?)
            .f32("beta", stage.read_rows(&beta, tokens)?))
    }

    fn run_backward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (rows, heads) = (self.capacity, self.spec.num_value_heads);
        let mut d_ba = stage.out("d_ba", &[rows, 2 * heads])?;
        stage.ops.delta_gates_backward(
            &mut d_ba,
            &stage.rows_f32("d_g", [rows, heads], &self.d_g)?,
            &stage.rows_f32("d_beta", [rows, heads], &self.d_beta)?,
            &stage.rows("ba", [rows, 2 * heads], &self.ba)?,
            &stage.f32("a_log", &[heads], &self.a_log)?,
            &stage.f32("dt_bias", &[heads], &self.dt_bias)?,
            self.spec,
            &self.state,
        )?;
        let d_ba = stage.read_rows(&d_ba, self.state.num_tokens())?;
        Ok(Outputs::new().activation("d_ba", d_ba))
    }

    /// `b`, `a + dt_bias` and `exp(a_log)` of a head at a token, and where b and a lie.
    fn at(&self, token: usize, head: usize) -> ([f64; 3], [usize; 2]) {
        let (b, a) = self.spec.ba_columns(head);
        let row = token * 2 * self.spec.num_value_heads;
        let biased = f64::from(self.ba[row + a]) + f64::from(self.dt_bias[head]);
        let rate = f64::from(self.a_log[head]).exp();
        let b_value = f64::from(self.ba[row + b]);
        ([b_value, biased, rate], [row + b, row + a])
    }

    fn oracle_forward(&self) -> Outputs {
        let (mut g, mut beta) = (Vec::new(), Vec::new());
        for token in 0..self.state.num_tokens() {
            for head in 0..self.spec.num_value_heads {
                let ([b, a, rate], _) = self.at(token, head);
                g.push(-rate * (a.max(0.0) + (-a.abs()).exp().ln_1p()));
                beta.push(sigmoid(b));
            }
        }
        Outputs::new().f32("g", g).f32("beta", beta)
    }

    fn oracle_backward(&self) -> Outputs {
        let heads = self.spec.num_value_heads;
        let mut d_ba = vec![0.0; self.ba.len()];
        for token in 0..self.state.num_tokens() {
            for head in 0..heads {
                let ([b, a, rate], [b_at, a_at]) = self.at(token, head);
                let gate = token * heads + head;
                d_ba[b_at] = f64::from(self.d_beta[gate]) * sigmoid(b) * (1.0 - sigmoid(b));
                d_ba[a_at] = -f64::from(self.d_g[gate]) * rate * sigmoid(a);
            }
        }
        Outputs::new().activation("d_ba", d_ba)
    }
}

fn gates_cases() -> Vec<Case> {
    let shapes = [
        ("one token", spec(4, 2, 16, 4), 1, 1),
        ("53 tokens, ratio 2", spec(4, 2, 16, 4), 53, 60),
        ("127 tokens, ratio 3", spec(2, 3, 16, 4), 127, 128),
        ("257 tokens, ratio 1", spec(4, 1, 16, 4), 257, 300),
    ];
    let both = |(label, spec, tokens, capacity): (&str, DeltaSpec, usize, usize)| {
        let inputs = || Gates::new(spec, tokens, capacity);
        let (run, oracle) = (inputs(), inputs());
        let forward = Case::new(
            "delta_gates_forward",
            label,
            move |stage| run.run_forward(stage),
            move || oracle.oracle_forward(),
        );
        let (run, oracle) = (inputs(), inputs());
        let backward = Case::new(
            "delta_gates_backward",
            label,
            move |stage| run.run_backward(stage),
            move || oracle.oracle_backward(),
        );
        [forward, backward]
    };
    shapes.into_iter().flat_map(both).collect()
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    conv_cases().into_iter().chain(gates_cases()).collect()
}
