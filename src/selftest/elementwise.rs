//! Cases of `elementwise`.

use super::stage::{Stage, scaled, state, values};
use super::{Case, Outputs};

const VOCAB: u32 = 101;

/// Extents of a case.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    capacity: usize,
    width: usize,
}

impl Shape {
    fn label(self) -> String {
        format!("T{}/{} D{}", self.tokens, self.capacity, self.width)
    }

    fn rows(self) -> [usize; 2] {
        [self.capacity, self.width]
    }

    fn values(self, seed: u64) -> Vec<f32> {
        values(self.tokens * self.width, seed)
    }

    fn logits(self) -> Vec<f32> {
        scaled(self.tokens, 5, 2.0)
    }
}

fn sigmoid(value: f64) -> f64 {
    1.0 / (1.0 + (-value).exp())
}

fn embedding(shape: Shape) -> Case {
    let table = move || values(VOCAB as usize * shape.width, 1);
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], VOCAB, 7);
        stage.load(&state)?;
        let weight = stage.dense("table", [VOCAB as usize, shape.width], &table())?;
        let mut out = stage.out("out", &shape.rows())?;
        stage.ops.embedding_forward(&mut out, &weight, &state)?;
        let out = stage.read_rows(&out, shape.tokens)?;
        Ok(Outputs::new().exact("out", bits(&out)))
    };
    let oracle = move || {
        let table = table();
        let ids = state(&[shape.tokens], VOCAB, 7).batch.input_ids;
        let row = |id: &u32| &table[*id as usize * shape.width..][..shape.width];
        let out = ids.iter().flat_map(row).map(|value| value.to_bits());
        Outputs::new().exact("out", out.collect())
    };
    Case::new("embedding_forward", shape.label(), run, oracle)
}

/// Bits of values that are f32.
fn bits(values: &[f64]) -> Vec<u32> {
    #[expect(clippy::cast_possible_truncation, reason = "widened from f32")]
    values
        .iter()
        .map(|value| (*value as f32).to_bits())
        .collect()
}

fn swiglu_backward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], VOCAB, 7);
        stage.load(&state)?;
        let d_h = stage.rows("d_h", shape.rows(), &shape.values(1))?;
        let gate = stage.rows("gate", shape.rows(), &shape.values(2))?;
        let up = stage.rows("up", shape.rows(), &shape.values(3))?;
        let mut d_gate = stage.out("d_gate", &shape.rows())?;
        let mut d_up = stage.out("d_up", &shape.rows())?;
        stage
            .ops
            .swiglu_backward(&mut d_gate, &mut d_up, &d_h, &gate, &up, &state)?;
        Ok(Outputs::new()
            .activation("d_gate", stage.read_rows(&d_gate, shape.tokens)?)
            .activation("d_up", stage.read_rows(&d_up, shape.tokens)?))
    };
    let oracle = move || {
        let (mut d_gate, mut d_up) = (Vec::new(), Vec::new());
        let (d_h, gate, up) = (shape.values(1), shape.values(2), shape.values(3));
        for ((d_h, gate), up) in d_h.iter().zip(&gate).zip(&up) {
            let (d_h, gate, up) = (f64::from(*d_h), f64::from(*gate), f64::from(*up));
            let s = sigmoid(gate);
            d_gate.push(d_h * up * (s + gate * s * (1.0 - s)));
            d_up.push(d_h * gate * s);
        }
        Outputs::new()
            .activation("d_gate", d_gate)
            .activation("d_up", d_up)
    };
    Case::new("swiglu_backward", shape.label(), run, oracle)
}

fn shared_forward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], VOCAB, 7);
        stage.load(&state)?;
        let mut out = stage.rows("out", shape.rows(), &shape.values(1))?;
        let shared = stage.rows("shared", shape.rows(), &shape.values(2))?;
        let logit = stage.rows_f32("logit", [shape.capacity, 1], &shape.logits())?;
        stage
            .ops
            .shared_expert_add_forward(&mut out, &shared, &logit, &state)?;
        Ok(Outputs::new().activation("out", stage.read_rows(&out, shape.tokens)?))
    };
    let oracle = move || {
        let (out, shared, logits) = (shape.values(1), shape.values(2), shape.logits());
        let terms = out.iter().zip(&shared).enumerate();
        let sum = terms.map(|(i, (out, shared))| {
            let gate = sigmoid(f64::from(logits[i / shape.width]));
            f64::from(*out) + gate * f64::from(*shared)
        });
        Outputs::new().activation("out", sum.collect())
    };
    Case::new("shared_expert_add_forward", shape.label(), run, oracle)
}

fn shared_backward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], VOCAB, 7);
        stage.load(&state)?;
        let d_out = stage.rows("d_out", shape.rows(), &shape.values(1))?;
        let shared = stage.rows("shared", shape.rows(), &shape.values(2))?;
        let logit = stage.rows_f32("logit", [shape.capacity, 1], &shape.logits())?;
        let mut d_shared = stage.out("d_shared", &shape.rows())?;
        let mut d_logit = stage.out_f32("d_logit", &[shape.capacity, 1])?;
        stage.ops.shared_expert_add_backward(
            &mut d_shared,
            &mut d_logit,
            &d_out,
            &shared,
            &logit,
            &state,
        )?;
        Ok(Outputs::new()
            .activation("d_shared", stage.read_rows(&d_shared, shape.tokens)?)
            .f32("d_logit", stage.read_rows(&d_logit, shape.tokens)?))
    };
    let oracle = move || {
        let (d_out, shared) = (shape.values(1), shape.values(2));
        let (mut d_shared, mut d_logit) = (Vec::new(), Vec::new());
        let rows = d_out.chunks(shape.width).zip(shared.chunks(shape.width));
        for ((d_out, shared), logit) in rows.zip(shape.logits()) {
            let gate = sigmoid(f64::from(logit));
            let mut dot = 0.0;
            for (d_out, shared) in d_out.iter().zip(shared) {
                d_shared.push(gate * f64::from(*d_out));
                dot += f64::from(*d_out) * f64::from(*shared);
            }
            d_logit.push(dot * gate * (1.0 - gate));
        }
        Outputs::new()
            .activation("d_shared", d_shared)
            .f32("d_logit", d_logit)
    };
    Case::new("shared_expert_add_backward", shape.label(), run, oracle)
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let shape = |tokens, capacity, width| Shape {
        tokens,
        capacity,
        width,
    };
    let shapes = [
        shape(1, 1, 8),
        shape(3, 7, 64),
        shape(7, 8, 2040),
        shape(5, 5, 2056),
        shape(2, 3, 5128),
    ];
    let mut cases = Vec::new();
    for shape in shapes {
        cases.extend([
            embedding(shape),
            swiglu_backward(shape),
            shared_forward(shape),
            shared_backward(shape),
        ]);
    }
    cases
}
