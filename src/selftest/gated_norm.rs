//! Cases of `gated_norm`.

use super::stage::{state, values};
use super::{Case, Outputs, Stage};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};

/// Inputs of both directions.
struct Inputs {
    spec: DeltaSpec,
    state: StepState,
    capacity: usize,
    o: Vec<f32>,
    qkvz: Vec<f32>,
    weight: Vec<f32>,
    d_y: Vec<f32>,
}

/// What backward reads of a head: `o`, `z`, `d_y` and `rstd`, and where they lie.
struct Head {
    o: Vec<f64>,
    z: Vec<f64>,
    d_y: Vec<f64>,
    rstd: f64,
    at: usize,
    z_at: usize,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

impl Inputs {
    fn new(spec: DeltaSpec, tokens: usize, capacity: usize) -> Self {
        Self {
            o: values(tokens * spec.value_dim(), 2),
            qkvz: values(tokens * spec.qkvz_dim(), 3),
            weight: values(spec.value_head_dim, 4),
            d_y: values(tokens * spec.value_dim(), 5),
            state: state(&[tokens], 100, 1),
            capacity,
            spec,
        }
    }

    fn run_forward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (spec, rows) = (self.spec, self.capacity);
        let mut y = stage.out("y", &[rows, spec.value_dim()])?;
        let mut rstd = stage.out_f32("rstd", &[rows, spec.num_value_heads])?;
        stage.ops.gated_rms_norm_forward(
            &mut y,
            &mut rstd,
            &stage.rows("o", [rows, spec.value_dim()], &self.o)?,
            &stage.rows("qkvz", [rows, spec.qkvz_dim()], &self.qkvz)?,
            &stage.f32("weight", &[spec.value_head_dim], &self.weight)?,
            spec,
            &self.state,
        )?;
        let tokens = self.state.num_tokens();
        Ok(Outputs::new()
            .activation("y", stage.read_rows(&y, tokens)?)
            .f32("rstd", stage.read_rows(&rstd, tokens)?))
    }

    fn run_backward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        stage.load(&self.state)?;
        let (spec, rows) = (self.spec, self.capacity);
        let mut d_o = stage.out("d_o", &[rows, spec.value_dim()])?;
        // The q, k and v columns belong to the convolution: what is there must stay.
        let before = self.qkvz.iter().map(|x| 2.0 * x).collect::<Vec<_>>();
        let mut d_qkvz = stage.rows("d_qkvz", [rows, spec.qkvz_dim()], &before)?;
        let rstd: Vec<f32> = self.heads().map(|head| head.rstd as f32).collect();
        stage.ops.gated_rms_norm_backward(
            &mut d_o,
            &mut d_qkvz,
            &stage.rows("d_y", [rows, spec.value_dim()], &self.d_y)?,
            &stage.rows("o", [rows, spec.value_dim()], &self.o)?,
            &stage.rows_f32("rstd", [rows, spec.num_value_heads], &rstd)?,
            &stage.rows("qkvz", [rows, spec.qkvz_dim()], &self.qkvz)?,
            &stage.f32("weight", &[spec.value_head_dim], &self.weight)?,
            spec,
            &self.state,
        )?;
        let tokens = self.state.num_tokens();
        Ok(Outputs::new()
            .activation("d_o", stage.read_rows(&d_o, tokens)?)
            .activation("d_qkvz", stage.read_rows(&d_qkvz, tokens)?))
    }

    /// Every head of every token.
    fn heads(&self) -> impl Iterator<Item = Head> {
        let (spec, heads) = (&self.spec, self.spec.num_value_heads);
        (0..self.state.num_tokens() * heads).map(move |row| {
            let dv = spec.value_head_dim;
            let z_at = row / heads * spec.qkvz_dim() + spec.z_column(row % heads);
            let o = wide(&self.o[row * dv..][..dv]);
            let mean = o.iter().map(|o| o * o).sum::<f64>() / dv as f64;
            Head {
                rstd: 1.0 / (mean + f64::from(spec.eps)).sqrt(),
                z: wide(&self.qkvz[z_at..][..dv]),
                d_y: wide(&self.d_y[row * dv..][..dv]),
                o,
                at: row * dv,
                z_at,
            }
        })
    }

    fn oracle_forward(&self) -> Outputs {
        let (mut y, mut rstd) = (Vec::new(), Vec::new());
        for head in self.heads() {
            rstd.push(head.rstd);
            for (i, weight) in self.weight.iter().enumerate() {
                let gate = head.z[i] * sigmoid(head.z[i]);
                y.push(f64::from(*weight) * head.o[i] * head.rstd * gate);
            }
        }
        Outputs::new().activation("y", y).f32("rstd", rstd)
    }

    fn oracle_backward(&self) -> Outputs {
        let dv = self.spec.value_head_dim;
        let mut d_o = vec![0.0; self.o.len()];
        let mut d_qkvz: Vec<f64> = wide(&self.qkvz).iter().map(|x| 2.0 * x).collect();
        for head in self.heads() {
            let weighted = |i: usize| head.d_y[i] * f64::from(self.weight[i]);
            let normed = |i: usize| head.o[i] * head.rstd;
            let d_normed = |i: usize| weighted(i) * head.z[i] * sigmoid(head.z[i]);
            let mean = (0..dv).map(|i| d_normed(i) * normed(i)).sum::<f64>() / dv as f64;
            for i in 0..dv {
                let gate = sigmoid(head.z[i]);
                d_o[head.at + i] = head.rstd * (d_normed(i) - normed(i) * mean);
                d_qkvz[head.z_at + i] =
                    weighted(i) * normed(i) * gate * (1.0 + head.z[i] * (1.0 - gate));
            }
        }
        Outputs::new()
            .activation("d_o", d_o)
            .activation("d_qkvz", d_qkvz)
    }
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let spec = |num_key_heads, ratio, dk, dv| DeltaSpec {
        num_key_heads,
        num_value_heads: num_key_heads * ratio,
        key_head_dim: dk,
        value_head_dim: dv,
        conv_kernel_dim: 4,
        eps: 1e-6,
    };
    let shapes = [
        ("one token, 16 wide", spec(1, 1, 16, 16), 1, 2),
        ("17 tokens, 48 wide", spec(1, 3, 32, 48), 17, 17),
        ("31 tokens, 128 wide", spec(2, 2, 16, 128), 31, 40),
        ("65 tokens, 64 wide", spec(2, 1, 16, 64), 65, 70),
    ];
    let both = |(label, spec, tokens, capacity): (&str, DeltaSpec, usize, usize)| {
        let inputs = || Inputs::new(spec, tokens, capacity);
        let (run, oracle) = (inputs(), inputs());
        let forward = Case::new(
            "gated_rms_norm_forward",
            label,
            move |stage| run.run_forward(stage),
            move || oracle.oracle_forward(),
        );
        let (run, oracle) = (inputs(), inputs());
        let backward = Case::new(
            "gated_rms_norm_backward",
            label,
            move |stage| run.run_backward(stage),
            move || oracle.oracle_backward(),
        );
        [forward, backward]
    };
    shapes.into_iter().flat_map(both).collect()
}
