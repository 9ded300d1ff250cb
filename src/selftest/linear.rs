//! Cases of `linear`.

mod oracle;

use super::stage::{scaled, state, values};
use super::{Case, Outputs, Stage};
use crate::error::Result;
use crate::ops::{DropoutState, GradOut, Linear, LoraPair, StepState};
use crate::store::Weight;
use crate::tensor::Tensor;

/// How a weight is held.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Dense,
    Plain,
    Nested,
}

use Kind::{Dense, Nested, Plain};

/// One projection.
#[derive(Debug, Clone, Copy)]
struct Projection {
    kind: Kind,
    out_features: usize,
    rank: usize,
    bias: bool,
    f32_output: bool,
}

fn projection(kind: Kind, out_features: usize, rank: usize) -> Projection {
    Projection {
        kind,
        out_features,
        rank,
        bias: false,
        f32_output: false,
    }
}

impl Projection {
    fn bias(mut self) -> Self {
        self.bias = true;
        self
    }

    fn f32_output(mut self) -> Self {
        self.f32_output = true;
        self
    }
}

/// What becomes of the gradient of x.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Gradient {
    Skip,
    Overwrite,
    Add,
}

/// One call.
#[derive(Debug, Clone)]
struct Call {
    lengths: Vec<usize>,
    capacity: usize,
    in_features: usize,
    projections: Vec<Projection>,
    /// Probability, and whether the step drops at all.
    dropout: (f32, bool),
    /// The adapter has the type of activations instead of f32.
    narrow_arena: bool,
    gradient: Gradient,
}

fn call(lengths: &[usize], capacity: usize, in_features: usize, of: &[Projection]) -> Call {
    Call {
        lengths: lengths.to_vec(),
        capacity,
        in_features,
        projections: of.to_vec(),
        dropout: (0.0, false),
        narrow_arena: false,
        gradient: Gradient::Overwrite,
    }
}

impl Call {
    fn dropout(mut self, probability: f32, is_on: bool) -> Self {
        self.dropout = (probability, is_on);
        self
    }

    fn narrow_arena(mut self) -> Self {
        self.narrow_arena = true;
        self
    }

    fn gradient(mut self, gradient: Gradient) -> Self {
        self.gradient = gradient;
        self
    }

    fn label(&self) -> String {
        let projections: Vec<String> = self
            .projections
            .iter()
            .map(|p| {
                let bias = if p.bias { "+b" } else { "" };
                let f32 = if p.f32_output { ":f32" } else { "" };
                format!("{:?}{}{bias}{f32}r{}", p.kind, p.out_features, p.rank)
            })
            .collect();
        format!(
            "tokens={} of {},in={},{},dropout={:?},{:?}{}",
            self.num_tokens(),
            self.capacity,
            self.in_features,
            projections.join(" "),
            self.dropout,
            self.gradient,
            if self.narrow_arena { ",narrow" } else { "" },
        )
    }

    fn num_tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn state(&self) -> StepState {
        let mut state = state(&self.lengths, 97, 1);
        state.dropout = self.dropout_state();
        state
    }

    fn dropout_state(&self) -> Option<DropoutState> {
        self.dropout.1.then_some(DropoutState {
            seed: 0x1234_5678_9abc_def0,
            optimizer_step: 3,
            first_token: 1000,
        })
    }

    /// Pairs, their `A`s and `B`s apart by whole groups of 256 elements, and the arena's length.
    fn pairs(&self) -> (Vec<Option<LoraPair>>, usize) {
        let mut end = 0;
        let mut place = |len: usize| {
            let start = end;
            end += len.next_multiple_of(256);
            start
        };
        let pairs = (7..).zip(&self.projections).map(|(module, p)| {
            (p.rank > 0).then(|| LoraPair {
                a: place(p.rank * self.in_features),
                b: place(p.rank * p.out_features),
                rank: p.rank,
                in_features: self.in_features,
                out_features: p.out_features,
                scaling: 1.75,
                dropout: self.dropout.0,
                module,
            })
        });
        let pairs = pairs.collect();
        (pairs, end)
    }

    fn total_rank(&self) -> usize {
        self.projections.iter().map(|p| p.rank).sum()
    }

    fn x(&self) -> Vec<f32> {
        values(self.num_tokens() * self.in_features, 2)
    }

    fn arena(&self) -> Vec<f32> {
        scaled(self.pairs().1, 3, 0.125)
    }

    fn weight_values(&self, index: usize) -> Vec<f32> {
        let len = self.projections[index].out_features * self.in_features;
        scaled(len, 10 + index as u64, 0.25)
    }

    fn bias_values(&self, index: usize) -> Option<Vec<f32>> {
        let p = self.projections[index];
        p.bias.then(|| values(p.out_features, 20 + index as u64))
    }

    fn xa(&self) -> Vec<f32> {
        values(self.num_tokens() * self.total_rank(), 4)
    }

    fn d_out(&self, index: usize) -> Vec<f32> {
        let len = self.num_tokens() * self.projections[index].out_features;
        values(len, 30 + index as u64)
    }

    fn d_x_before(&self) -> Vec<f32> {
        values(self.num_tokens() * self.in_features, 5)
    }

    fn d_lora_before(&self) -> Vec<f32> {
        values(self.pairs().1, 6)
    }

    fn linears(&self, stage: &Stage<'_>) -> Result<Vec<Linear>> {
        let (pairs, _) = self.pairs();
        let linear = |(index, p): (usize, &Projection)| {
            let shape = [p.out_features, self.in_features];
            let values = self.weight_values(index);
            let weight: Weight = match p.kind {
                Dense => stage.dense("weight", shape, &values)?,
                Plain | Nested => stage.nf4("weight", shape, &values, p.kind == Nested)?,
            };
            let bias = self.bias_values(index);
            let bias = bias.map(|bias| stage.f32("bias", &[p.out_features], &bias));
            Ok(Linear {
                weight,
                bias: bias.transpose()?,
                lora: pairs[index],
                out_features: p.out_features,
                in_features: self.in_features,
                f32_output: p.f32_output,
            })
        };
        self.projections.iter().enumerate().map(linear).collect()
    }

    fn arena_tensor(&self, stage: &Stage<'_>, name: &str, values: &[f32]) -> Result<Tensor> {
        if self.narrow_arena {
            stage.activation(name, &[values.len()], values)
        } else {
            stage.f32(name, &[values.len()], values)
        }
    }

    fn outs(&self, stage: &Stage<'_>) -> Result<Vec<Tensor>> {
        let out = |p: &Projection| {
            let shape = [self.capacity, p.out_features];
            if p.f32_output {
                stage.out_f32("out", &shape)
            } else {
                stage.out("out", &shape)
            }
        };
        self.projections.iter().map(out).collect()
    }

    fn run_forward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        let state = self.state();
        stage.load(&state)?;
        let tokens = state.num_tokens();
        let x = stage.rows("x", [self.capacity, self.in_features], &self.x())?;
        let mut xa = stage.out("xa", &[self.capacity, self.total_rank()])?;
        let lora = self.arena_tensor(stage, "lora", &self.arena())?;
        let linears = self.linears(stage)?;
        let mut outs = self.outs(stage)?;
        stage.ops.linear_forward(
            &mut outs.iter_mut().collect::<Vec<_>>(),
            &mut xa,
            &x,
            &linears.iter().collect::<Vec<_>>(),
            &lora,
            &state,
        )?;
        let mut outputs = Outputs::new().activation("xa", stage.read_rows(&xa, tokens)?);
        for (out, p) in outs.iter().zip(&self.projections) {
            let values = stage.read_rows(out, tokens)?;
            outputs = if p.f32_output {
                outputs.f32("out", values)
            } else {
                outputs.activation("out", values)
            };
        }
        Ok(outputs)
    }

    fn run_swiglu(&self, stage: &Stage<'_>) -> Result<Outputs> {
        let state = self.state();
        stage.load(&state)?;
        let tokens = state.num_tokens();
        let width = self.projections[0].out_features;
        let x = stage.rows("x", [self.capacity, self.in_features], &self.x())?;
        let mut xa = stage.out("xa", &[self.capacity, self.total_rank()])?;
        let lora = self.arena_tensor(stage, "lora", &self.arena())?;
        let linears = self.linears(stage)?;
        let mut h = stage.out("h", &[self.capacity, width])?;
        let mut gate = stage.out("gate", &[self.capacity, width])?;
        let mut up = stage.out("up", &[self.capacity, width])?;
        let linears = [&linears[0], &linears[1]];
        stage.ops.linear_swiglu_forward(
            &mut h, &mut gate, &mut up, &mut xa, &x, linears, &lora, &state,
        )?;
        Ok(Outputs::new()
            .activation("xa", stage.read_rows(&xa, tokens)?)
            .activation("gate", stage.read_rows(&gate, tokens)?)
            .activation("up", stage.read_rows(&up, tokens)?)
            .activation("h", stage.read_rows(&h, tokens)?))
    }

    fn run_backward(&self, stage: &Stage<'_>) -> Result<Outputs> {
        let state = self.state();
        stage.load(&state)?;
        let x_shape = [self.capacity, self.in_features];
        let x = stage.rows("x", x_shape, &self.x())?;
        let xa = stage.rows("xa", [self.capacity, self.total_rank()], &self.xa())?;
        let lora = self.arena_tensor(stage, "lora", &self.arena())?;
        let before = self.d_lora_before();
        let mut d_lora = stage.f32("d_lora", &[before.len()], &before)?;
        let linears = self.linears(stage)?;
        let d_out = |(index, p): (usize, &Projection)| {
            let shape = [self.capacity, p.out_features];
            if p.f32_output {
                stage.rows_f32("d_out", shape, &self.d_out(index))
            } else {
                stage.rows("d_out", shape, &self.d_out(index))
            }
        };
        let d_outs = self.projections.iter().enumerate().map(d_out);
        let d_outs: Vec<Tensor> = d_outs.collect::<Result<_>>()?;
        let mut d_x = match self.gradient {
            Gradient::Add => stage.rows("d_x", x_shape, &self.d_x_before())?,
            Gradient::Skip | Gradient::Overwrite => stage.out("d_x", &x_shape)?,
        };
        stage.ops.linear_backward(
            match self.gradient {
                Gradient::Skip => GradOut::Skip,
                Gradient::Overwrite => GradOut::Overwrite(&mut d_x),
                Gradient::Add => GradOut::Add(&mut d_x),
            },
            &mut d_lora,
            &d_outs.iter().collect::<Vec<_>>(),
            &x,
            &xa,
            &linears.iter().collect::<Vec<_>>(),
            &lora,
            &state,
        )?;
        let mut outputs = Outputs::new();
        if self.gradient == Gradient::Skip {
            stage.read_rows(&d_x, 0)?;
        } else {
            outputs = outputs.activation("d_x", stage.read_rows(&d_x, state.num_tokens())?);
        }
        let d_lora = stage.read(&d_lora)?;
        Ok(self.grad_outputs(outputs, &d_lora))
    }

    /// Gradients of every `A` and `B`, and what lies between them.
    fn grad_outputs(&self, mut outputs: Outputs, d_lora: &[f64]) -> Outputs {
        let mut between = d_lora.to_vec();
        for pair in self.pairs().0.into_iter().flatten() {
            for (name, range) in [("d_a", pair.a_range()), ("d_b", pair.b_range())] {
                let values = d_lora[range.clone()].to_vec();
                outputs = if self.narrow_arena {
                    outputs.activation(name, values)
                } else {
                    outputs.f32(name, values)
                };
                between[range].fill(0.0);
            }
        }
        outputs.activation("between", between)
    }
}

fn forward_case(call: Call) -> Case {
    let oracle = call.clone();
    Case::new(
        "linear_forward",
        call.label(),
        move |stage| call.run_forward(stage),
        move || oracle.forward_oracle(),
    )
}

fn swiglu_case(call: Call) -> Case {
    let oracle = call.clone();
    Case::new(
        "linear_swiglu_forward",
        call.label(),
        move |stage| call.run_swiglu(stage),
        move || oracle.swiglu_oracle(),
    )
}

fn backward_case(call: Call) -> Case {
    let oracle = call.clone();
    Case::new(
        "linear_backward",
        call.label(),
        move |stage| call.run_backward(stage),
        move || oracle.backward_oracle(),
    )
}

/// Calls that forward and backward share.
fn calls() -> Vec<Call> {
    let one = |kind, out_features, rank| [projection(kind, out_features, rank)];
    vec![
        // One token, one output.
        call(&[1], 1, 8, &one(Dense, 1, 0)),
        call(&[1], 3, 64, &[projection(Nested, 1, 1).f32_output()]),
        // q, k and v: a column tile of each ends early; three masks; a sequence ends inside a tile.
        call(
            &[40, 25],
            70,
            192,
            &[
                projection(Nested, 72, 16).bias(),
                projection(Nested, 24, 4).bias(),
                projection(Plain, 129, 8).bias(),
            ],
        )
        .dropout(0.25, true),
        // Evaluation: a probability, but no dropout in the step. As many tokens as the capacity.
        call(&[64], 64, 64, &one(Plain, 63, 16)).dropout(0.25, false),
        // More ranks than a stage holds, an arena in bf16, f32 results; no multiple of 64 columns.
        call(
            &[31, 32],
            65,
            200,
            &[projection(Dense, 65, 72).f32_output()],
        )
        .narrow_arena()
        .dropout(0.5, true),
        // Blocks that cross rows; both kinds in one call.
        call(
            &[17],
            20,
            144,
            &[projection(Nested, 48, 20), projection(Dense, 40, 0)],
        ),
        call(&[5], 5, 48, &one(Plain, 33, 2)),
        // The large tiles: one after the end of the batch, one that ends early, odd columns of xa.
        call(
            &[100, 29],
            270,
            128,
            &[projection(Nested, 136, 3), projection(Dense, 131, 16)],
        )
        .narrow_arena()
        .dropout(0.1, true),
        call(&[127], 260, 72, &one(Dense, 16, 17)),
        // A capacity of a wide tile for each multiprocessor.
        call(&[65], 132 * 128, 64, &one(Nested, 200, 16)).dropout(0.1, true),
        call(&[2], 132 * 128, 40, &one(Dense, 33, 4)),
    ]
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let forward = calls().into_iter().map(forward_case);
    let gradients = [Gradient::Overwrite, Gradient::Add];
    let backward = calls().into_iter().zip(gradients.into_iter().cycle());
    let backward = backward.map(|(call, gradient)| backward_case(call.gradient(gradient)));
    let pair = |kinds: [Kind; 2], out_features, ranks: [usize; 2]| {
        [0, 1].map(|i| projection(kinds[i], out_features, ranks[i]))
    };
    let more = [
        // Gradients in parts of the batch, added in order; a part that has no token.
        backward_case(call(&[700, 333], 2100, 16, &[projection(Dense, 8, 2)]).dropout(0.1, true)),
        backward_case(
            call(
                &[9, 4],
                16,
                64,
                &[projection(Nested, 40, 8), projection(Nested, 13, 0)],
            )
            .gradient(Gradient::Skip),
        ),
        swiglu_case(call(&[1], 2, 64, &pair([Nested, Nested], 8, [0, 0]))),
        swiglu_case(
            call(&[33, 32], 70, 128, &pair([Nested, Plain], 40, [16, 4])).dropout(0.25, true),
        ),
        swiglu_case(call(
            &[63],
            63,
            72,
            &pair([Dense, Dense], 131, [0, 70]).map(Projection::bias),
        )),
        swiglu_case(call(&[7], 9, 128, &pair([Nested, Dense], 67, [8, 8])).narrow_arena()),
        swiglu_case(call(
            &[10, 121],
            257,
            64,
            &pair([Plain, Plain], 72, [5, 16]),
        )),
        swiglu_case(call(&[3], 300, 32, &pair([Nested, Nested], 129, [2, 2]))),
        swiglu_case(call(
            &[66],
            132 * 128,
            64,
            &pair([Nested, Nested], 97, [8, 3]),
        )),
    ];
    forward.chain(backward).chain(more).collect()
}
