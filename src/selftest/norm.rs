//! Cases of `norm`.

use super::stage::{Stage, state, values};
use super::{Case, Outputs};
use crate::ops::{GradOut, NormSpec};

const EPS: f32 = 1e-6;

/// Extents of a case.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    capacity: usize,
    hidden: usize,
    zero_centered: bool,
}

impl Shape {
    fn label(self) -> String {
        let centre = if self.zero_centered { " 1+w" } else { "" };
        format!(
            "T{}/{} D{}{centre}",
            self.tokens, self.capacity, self.hidden
        )
    }

    fn rows(self) -> [usize; 2] {
        [self.capacity, self.hidden]
    }

    fn values(self, seed: u64) -> Vec<f32> {
        values(self.tokens * self.hidden, seed)
    }

    fn weight(self) -> Vec<f32> {
        values(self.hidden, 9)
    }

    /// What the weights stand for.
    fn factors(self) -> Vec<f64> {
        let offset = if self.zero_centered { 1.0 } else { 0.0 };
        let factor = |weight: &f32| offset + f64::from(*weight);
        self.weight().iter().map(factor).collect()
    }

    fn spec(self) -> NormSpec {
        NormSpec {
            eps: EPS,
            zero_centered: self.zero_centered,
        }
    }
}

fn rstd(row: &[f64]) -> f64 {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    1.0 / (mean + f64::from(EPS)).sqrt()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// Normed rows, and the inverse root mean square of each.
fn normalize(shape: Shape, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let factors = shape.factors();
    let (mut out, mut rstds) = (Vec::new(), Vec::new());
    for row in x.chunks(shape.hidden) {
        let rstd = rstd(row);
        out.extend(
            row.iter()
                .zip(&factors)
                .map(|(x, factor)| x * rstd * factor),
        );
        rstds.push(rstd);
    }
    (out, rstds)
}

fn forward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], 100, 7);
        stage.load(&state)?;
        let x = stage.rows("x", shape.rows(), &shape.values(1))?;
        let weight = stage.f32("weight", &[shape.hidden], &shape.weight())?;
        let mut out = stage.out("out", &shape.rows())?;
        let mut rstd = stage.out_f32("rstd", &[shape.capacity, 1])?;
        stage
            .ops
            .rms_norm_forward(&mut out, &mut rstd, &x, &weight, shape.spec(), &state)?;
        Ok(Outputs::new()
            .activation("out", stage.read_rows(&out, shape.tokens)?)
            .f32("rstd", stage.read_rows(&rstd, shape.tokens)?))
    };
    let oracle = move || {
        let (out, rstd) = normalize(shape, &wide(&shape.values(1)));
        Outputs::new().activation("out", out).f32("rstd", rstd)
    };
    Case::new("rms_norm_forward", shape.label(), run, oracle)
}

fn add_forward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], 100, 7);
        stage.load(&state)?;
        let x = stage.rows("x", shape.rows(), &shape.values(1))?;
        let delta = stage.rows("delta", shape.rows(), &shape.values(2))?;
        let weight = stage.f32("weight", &[shape.hidden], &shape.weight())?;
        let mut sum = stage.out("sum", &shape.rows())?;
        let mut out = stage.out("out", &shape.rows())?;
        let mut rstd = stage.out_f32("rstd", &[shape.capacity, 1])?;
        stage.ops.add_rms_norm_forward(
            &mut sum,
            &mut out,
            &mut rstd,
            &x,
            &delta,
            &weight,
            shape.spec(),
            &state,
        )?;
        Ok(Outputs::new()
            .activation("out", stage.read_rows(&out, shape.tokens)?)
            .activation("rstd", stage.read_rows(&rstd, shape.tokens)?)
            .activation("sum", stage.read_rows(&sum, shape.tokens)?))
    };
    let oracle = move || {
        let (x, delta) = (wide(&shape.values(1)), wide(&shape.values(2)));
        let sum: Vec<f64> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
        let (out, rstd) = normalize(shape, &sum);
        // The norm is that of the rounded sum: its inverse is as exact as an activation.
        Outputs::new()
            .activation("out", out)
            .activation("rstd", rstd)
            .activation("sum", sum)
    };
    Case::new("add_rms_norm_forward", shape.label(), run, oracle)
}

fn backward(shape: Shape, accumulate: bool) -> Case {
    let saved = move || -> Vec<f32> {
        let x = wide(&shape.values(1));
        let rstds = x.chunks(shape.hidden).map(rstd);
        #[expect(clippy::cast_possible_truncation, reason = "saved as f32")]
        rstds.map(|rstd| rstd as f32).collect()
    };
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], 100, 7);
        stage.load(&state)?;
        let x = stage.rows("x", shape.rows(), &shape.values(1))?;
        let d_out = stage.rows("d_out", shape.rows(), &shape.values(2))?;
        let rstd = stage.rows_f32("rstd", [shape.capacity, 1], &saved())?;
        let weight = stage.f32("weight", &[shape.hidden], &shape.weight())?;
        let mut d_x = if accumulate {
            stage.rows("d_x", shape.rows(), &shape.values(3))?
        } else {
            stage.out("d_x", &shape.rows())?
        };
        let out = if accumulate {
            GradOut::Add(&mut d_x)
        } else {
            GradOut::Overwrite(&mut d_x)
        };
        let spec = shape.spec();
        stage
            .ops
            .rms_norm_backward(out, &d_out, &x, &rstd, &weight, spec, &state)?;
        stage
            .ops
            .rms_norm_backward(GradOut::Skip, &d_out, &x, &rstd, &weight, spec, &state)?;
        Ok(Outputs::new().activation("d_x", stage.read_rows(&d_x, shape.tokens)?))
    };
    let oracle = move || {
        let (x, d_out) = (wide(&shape.values(1)), wide(&shape.values(2)));
        let factors = shape.factors();
        let mut d_x = if accumulate {
            wide(&shape.values(3))
        } else {
            vec![0.0; x.len()]
        };
        for (row, rstd) in saved().into_iter().enumerate() {
            let (rstd, at) = (f64::from(rstd), row * shape.hidden);
            let product = |i: usize| d_out[at + i] * factors[i] * x[at + i] * rstd;
            let mean = (0..shape.hidden).map(product).sum::<f64>() / shape.hidden as f64;
            for i in 0..shape.hidden {
                d_x[at + i] += rstd * (d_out[at + i] * factors[i] - x[at + i] * rstd * mean);
            }
        }
        Outputs::new().activation("d_x", d_x)
    };
    let label = format!("{}{}", shape.label(), if accumulate { " add" } else { "" });
    Case::new("rms_norm_backward", label, run, oracle)
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let shape = |tokens, capacity, hidden, zero_centered| Shape {
        tokens,
        capacity,
        hidden,
        zero_centered,
    };
    let shapes = [
        shape(1, 1, 8, false),
        shape(3, 5, 64, true),
        shape(7, 8, 2040, false),
        shape(5, 5, 2056, true),
        shape(2, 3, 5128, false),
    ];
    let mut cases: Vec<Case> = Vec::new();
    for shape in shapes {
        cases.extend([
            forward(shape),
            add_forward(shape),
            backward(shape, false),
            backward(shape, true),
        ]);
    }
    cases
}
