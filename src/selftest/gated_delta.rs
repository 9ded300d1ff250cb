//! Cases of `gated_delta`.

mod chunked;
mod recurrence;

use super::stage::{scaled, state, values};
use super::{Case, Outputs, Stage};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};

/// Shapes of a case, and how its gates are drawn.
#[derive(Debug, Clone)]
struct Shape {
    lengths: &'static [usize],
    capacity: usize,
    num_key_heads: usize,
    ratio: usize,
    dk: usize,
    dv: usize,
    /// `g = -decay |normal|`.
    decay: f32,
    /// `beta = sigma(normal + bias)`.
    beta_bias: f32,
}

/// What an op is called with; all values are bf16 numbers where they are activations.
#[derive(Debug)]
struct Inputs {
    spec: DeltaSpec,
    state: StepState,
    capacity: usize,
    u: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    d_o: Vec<f32>,
}

/// Gradients of all tokens.
#[derive(Debug)]
struct Grads {
    d_u: Vec<f64>,
    d_g: Vec<f64>,
    d_beta: Vec<f64>,
}

impl Grads {
    fn zeros(inputs: &Inputs) -> Self {
        let tokens = inputs.state.num_tokens();
        Self {
            d_u: vec![0.0; tokens * inputs.spec.conv_dim()],
            d_g: vec![0.0; tokens * inputs.spec.num_value_heads],
            d_beta: vec![0.0; tokens * inputs.spec.num_value_heads],
        }
    }

    fn outputs(self) -> Outputs {
        Outputs::new()
            .activation("d_u", self.d_u)
            .f32("d_g", self.d_g)
            .f32("d_beta", self.d_beta)
    }
}

impl Inputs {
    fn new(shape: &Shape) -> Self {
        let spec = DeltaSpec {
            num_key_heads: shape.num_key_heads,
            num_value_heads: shape.num_key_heads * shape.ratio,
            key_head_dim: shape.dk,
            value_head_dim: shape.dv,
            conv_kernel_dim: 4,
            eps: 1e-6,
        };
        let state = state(shape.lengths, 100, 1);
        let tokens = state.num_tokens();
        let gates = tokens * spec.num_value_heads;
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        Self {
            u: scaled(tokens * spec.conv_dim(), 2, 0.5),
            g: values(gates, 3)
                .iter()
                .map(|x| -shape.decay * x.abs())
                .collect(),
            beta: values(gates, 4)
                .iter()
                .map(|x| sigmoid(x + shape.beta_bias))
                .collect(),
            d_o: values(tokens * spec.value_dim(), 5),
            capacity: shape.capacity,
            state,
            spec,
        }
    }

    fn run_forward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (spec, rows) = (self.spec, self.capacity);
        let mut o = stage.out("o", &[rows, spec.value_dim()])?;
        stage.ops.gated_delta_forward(
            &mut o,
            &stage.rows("u", [rows, spec.conv_dim()], &self.u)?,
            &stage.rows_f32("g", [rows, spec.num_value_heads], &self.g)?,
            &stage.rows_f32("beta", [rows, spec.num_value_heads], &self.beta)?,
            spec,
            &self.state,
        )?;
        Ok(Outputs::new().activation("o", stage.read_rows(&o, self.state.num_tokens())?))
    }

    fn run_backward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (spec, rows) = (self.spec, self.capacity);
        let gates = [rows, spec.num_value_heads];
        let mut d_u = stage.out("d_u", &[rows, spec.conv_dim()])?;
        let mut d_g = stage.out_f32("d_g", &gates)?;
        let mut d_beta = stage.out_f32("d_beta", &gates)?;
        stage.ops.gated_delta_backward(
            &mut d_u,
            &mut d_g,
            &mut d_beta,
            &stage.rows("d_o", [rows, spec.value_dim()], &self.d_o)?,
            &stage.rows("u", [rows, spec.conv_dim()], &self.u)?,
            &stage.rows_f32("g", gates, &self.g)?,
            &stage.rows_f32("beta", gates, &self.beta)?,
            spec,
            &self.state,
        )?;
        let tokens = self.state.num_tokens();
        let grads = Grads {
            d_u: stage.read_rows(&d_u, tokens)?,
            d_g: stage.read_rows(&d_g, tokens)?,
            d_beta: stage.read_rows(&d_beta, tokens)?,
        };
        Ok(grads.outputs())
    }
}

fn forward_case(label: &str, shape: &Shape) -> Case {
    let [run, oracle, naive] = [(); 3].map(|()| Inputs::new(shape));
    Case::new(
        "gated_delta_forward",
        label,
        move |stage| run.run_forward(stage),
        move || Outputs::new().activation("o", recurrence::forward(&oracle)),
    )
    .naive(move || Outputs::new().activation("o", chunked::forward(&naive)))
}

fn backward_case(label: &str, shape: &Shape) -> Case {
    let [run, oracle, naive] = [(); 3].map(|()| Inputs::new(shape));
    Case::new(
        "gated_delta_backward",
        label,
        move |stage| run.run_backward(stage),
        move || recurrence::backward(&oracle).outputs(),
    )
    .naive(move || chunked::backward(&naive).outputs())
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let plain = Shape {
        lengths: &[64],
        capacity: 64,
        num_key_heads: 1,
        ratio: 1,
        dk: 16,
        dv: 16,
        decay: 0.05,
        beta_bias: 0.0,
    };
    // Every head size and border that a tile could get wrong, and gates at both ends of their range.
    #[rustfmt::skip]
    let shapes = [
        ("one token", Shape { lengths: &[1], capacity: 3, num_key_heads: 4, ratio: 2, ..plain }),
        ("7 tokens, 32 x 16", Shape { lengths: &[7], capacity: 7, num_key_heads: 2, ratio: 2, dk: 32, ..plain }),
        ("63 tokens, 64 x 64", Shape { lengths: &[63], capacity: 70, dk: 64, dv: 64, ..plain }),
        ("64 tokens, 48 x 32", Shape { num_key_heads: 2, ratio: 2, dk: 48, dv: 32, ..plain }),
        ("65 tokens, 16 x 48", Shape { lengths: &[65], capacity: 80, dv: 48, ..plain }),
        ("130 tokens, 64 x 64", Shape { lengths: &[130], capacity: 200, ratio: 2, dk: 64, dv: 64, ..plain }),
        ("130 tokens, 128 x 128", Shape { lengths: &[130], capacity: 130, dk: 128, dv: 128, ..plain }),
        ("packed, ratio 3", Shape { lengths: &[5, 70, 1, 1, 66], capacity: 150, ratio: 3, dk: 32, dv: 32, ..plain }),
        ("many short", Shape { lengths: &[30, 65, 64, 9, 30, 1, 30, 2, 3, 70], capacity: 400, ..plain }),
        ("decay 5", Shape { lengths: &[90, 41], capacity: 140, ratio: 2, dv: 128, decay: 5.0, ..plain }),
        ("decay 8, beta near 0", Shape { lengths: &[90], capacity: 90, dk: 128, dv: 64, decay: 8.0, beta_bias: -4.0, ..plain }),
        // Chunks between others whose state is still there at their end.
        ("220 tokens, slow decay", Shape { lengths: &[220], capacity: 230, dv: 32, decay: 0.005, beta_bias: -2.0, ..plain }),
        ("no decay, beta near 1", Shape { lengths: &[100], capacity: 100, dk: 64, dv: 64, decay: 0.0, beta_bias: 4.0, ..plain }),
    ];
    let both = |(label, shape): &(&str, Shape)| {
        let cases = [forward_case(label, shape), backward_case(label, shape)];
        cases.into_iter()
    };
    shapes.iter().flat_map(both).collect()
}
