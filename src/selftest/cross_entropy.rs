//! Cases of `cross_entropy`.

use super::stage::{Stage, scaled, state, values};
use super::{Case, Outputs, Values};
use crate::backend::cpu::Cpu;
use crate::error::Result;
use crate::ops::{GradOut, StepState};

/// Extents of a case.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Lengths of the packed sequences.
    lengths: &'static [usize],
    capacity: usize,
    hidden: usize,
    vocab_size: u32,
    /// Of the head's weights; a power of two.
    scale: f32,
}

impl Shape {
    fn label(self) -> String {
        format!(
            "T{:?}/{} D{} V{} x{}",
            self.lengths, self.capacity, self.hidden, self.vocab_size, self.scale
        )
    }

    fn tokens(self) -> usize {
        self.lengths.iter().sum()
    }

    fn state(self) -> StepState {
        state(self.lengths, self.vocab_size, 7)
    }

    fn x(self) -> Vec<f32> {
        values(self.tokens() * self.hidden, 1)
    }

    fn head(self) -> Vec<f32> {
        scaled(self.vocab_size as usize * self.hidden, 2, self.scale)
    }

    /// Losses of the micro-batches before.
    fn before(self) -> Vec<f32> {
        values(self.tokens(), 3)
    }
}

/// Loss and gradient, and then once more the loss alone.
fn run(shape: Shape, stage: &Stage<'_>) -> Result<Outputs> {
    let state = shape.state();
    stage.load(&state)?;
    let rows = [shape.capacity, shape.hidden];
    let vocab_size = shape.vocab_size as usize;
    let x = stage.rows("x", rows, &shape.x())?;
    let head = stage.dense("head", [vocab_size, shape.hidden], &shape.head())?;
    let mut token_loss = stage.rows_f32("token_loss", [shape.capacity, 1], &shape.before())?;
    let mut d_x = stage.out("d_x", &rows)?;
    for out in [GradOut::Overwrite(&mut d_x), GradOut::Skip] {
        stage
            .ops
            .linear_cross_entropy(&mut token_loss, out, &x, &head, vocab_size, &state)?;
    }
    Ok(Outputs::new()
        .f32("token_loss", stage.read_rows(&token_loss, shape.tokens())?)
        .activation("d_x", stage.read_rows(&d_x, shape.tokens())?))
}

fn oracle(shape: Shape) -> Outputs {
    let (x, head, state) = (shape.x(), shape.head(), shape.state());
    let wide = |value: &f32| f64::from(*value);
    let mut loss: Vec<f64> = shape.before().iter().map(wide).collect();
    let mut d_x = vec![0.0; x.len()];
    for (row, target) in state.batch.target_ids.iter().enumerate() {
        let Ok(target) = usize::try_from(*target) else {
            continue;
        };
        let at = row * shape.hidden;
        let logit = |weights: &[f32]| -> f64 {
            let terms = weights.iter().zip(&x[at..]);
            terms.map(|(w, x)| wide(w) * wide(x)).sum()
        };
        let logits: Vec<f64> = head.chunks(shape.hidden).map(logit).collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, z| m.max(*z));
        let sum: f64 = logits.iter().map(|z| (z - max).exp()).sum();
        loss[row] += 2.0 * (sum.ln() + max - logits[target]);
        for (v, weights) in head.chunks(shape.hidden).enumerate() {
            let onehot = if v == target { 1.0 } else { 0.0 };
            let d_logit = f64::from(state.loss_scale) * ((logits[v] - max).exp() / sum - onehot);
            for (i, weight) in weights.iter().enumerate() {
                d_x[at + i] += d_logit * wide(weight);
            }
        }
    }
    Outputs::new()
        .f32("token_loss", loss)
        .activation("d_x", d_x)
}

/// Logits rounded to bf16, but for the loss, which is that of unrounded ones.
fn naive(shape: Shape) -> Outputs {
    let cpu = Cpu::with_bf16_rounding();
    let rounded = run(shape, &Stage::new(&cpu)).unwrap_or_default();
    let exact = oracle(shape);
    let mut outputs = Outputs::new();
    for (exact, rounded) in exact.0.into_iter().zip(rounded.0) {
        let is_loss = matches!(exact.values, Values::F32(_));
        outputs.0.push(if is_loss { exact } else { rounded });
    }
    outputs
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let shape = |lengths, capacity, hidden, vocab_size, scale| Shape {
        lengths,
        capacity,
        hidden,
        vocab_size,
        scale,
    };
    let shapes = [
        shape(&[2], 2, 8, 288, 0.5),
        // No target at all.
        shape(&[1], 3, 64, 65, 0.5),
        // Columns off a tile and off a group, several column tiles.
        shape(&[13, 31], 50, 72, 1009, 0.25),
        // Sharp: most of the probability on few columns.
        shape(&[17], 17, 128, 257, 2.0),
        // Several chunks of 128 rows, and chunks beyond the targets.
        shape(&[97, 1, 100], 260, 40, 65, 0.25),
        // Several tiles of hidden columns, one group of logits: sums that are not cut into parts.
        shape(&[19], 20, 264, 63, 0.125),
        shape(&[131, 70], 201, 24, 33, 0.25),
    ];
    let case = |shape: Shape| {
        Case::new(
            "linear_cross_entropy",
            shape.label(),
            move |stage| run(shape, stage),
            move || oracle(shape),
        )
        .naive(move || naive(shape))
    };
    shapes.into_iter().map(case).collect()
}
