//! Cases of `moe`: the routed experts.

mod oracle;

use self::oracle::{Oracle, exact, to_bf16};
use super::stage::{Stage, nf4_values, scaled, state, values};
use super::{Case, Outputs};
use crate::error::Result;
use crate::ops::{DropoutState, Experts, ExpertsLora, GradOut, LoraPair, Routing, StepState};
use crate::random::{Draws, Stream};
use crate::store::Weight;
use crate::store::nf4::Nf4Matrix;
use crate::tensor::Tensor;

/// How weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Dense,
    Nf4,
    NestedNf4,
}

/// Extents and variants of a case.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    capacity: usize,
    num_experts: usize,
    top_k: usize,
    hidden: usize,
    width: usize,
    held: Held,
    /// Ranks of gate, up and down; 0: no adapter.
    ranks: [usize; 3],
    dropout: f32,
    /// Experts from this one on get no token.
    used_experts: usize,
    /// Elements of the arena before the layer's.
    arena_start: usize,
    /// The adapter has the type of activations instead of f32.
    narrow_arena: bool,
}

/// What `d_x` is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Skip,
    Overwrite,
    Add,
}

fn index(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Shape {
    fn label(self) -> String {
        let Self {
            tokens,
            capacity,
            num_experts,
            top_k,
            hidden,
            width,
            held,
            ranks,
            dropout,
            used_experts,
            narrow_arena,
            ..
        } = self;
        let narrow = if narrow_arena { " narrow" } else { "" };
        format!(
            "T{tokens}/{capacity} E{used_experts}/{num_experts} K{top_k} D{hidden} I{width} {held:?} ranks {ranks:?} p{dropout}{narrow}"
        )
    }

    fn routed(self) -> usize {
        self.tokens * self.top_k
    }

    fn state(self) -> StepState {
        let mut state = state(&[self.tokens], 100, 7);
        state.dropout = Some(DropoutState {
            seed: 42,
            optimizer_step: 3,
            first_token: 11,
        });
        state
    }

    /// `[out_features, in_features]` of gate, up and down.
    fn dims(self) -> [[usize; 2]; 3] {
        let inward = [self.width, self.hidden];
        [inward, inward, [self.hidden, self.width]]
    }

    fn lora(self) -> ExpertsLora {
        let mut next = self.arena_start;
        let mut pairs = [None; 3];
        for (which, [out_features, in_features]) in self.dims().into_iter().enumerate() {
            let rank = self.ranks[which];
            if rank == 0 {
                continue;
            }
            let b = next + rank * in_features;
            pairs[which] = Some(LoraPair {
                a: next,
                b,
                rank,
                in_features,
                out_features,
                scaling: [0.5, 1.5, 2.0][which],
                dropout: self.dropout,
                module: 5 + index(which),
            });
            next = b + rank * out_features;
        }
        ExpertsLora {
            gate: pairs[0],
            up: pairs[1],
            down: pairs[2],
            stride: next - self.arena_start,
            module_stride: 3,
        }
    }

    fn arena_len(self) -> usize {
        self.arena_start + self.num_experts * self.lora().stride + 5
    }

    /// Adapters' values: small, so that the base product is seen beside theirs.
    fn arena(self, seed: u64) -> Vec<f32> {
        scaled(self.arena_len(), seed, 0.125)
    }

    /// Values of a projection of an expert as they are given.
    fn raw(self, which: usize, expert: usize) -> Vec<f32> {
        let [out_features, in_features] = self.dims()[which];
        scaled(
            out_features * in_features,
            (100 + 10 * expert + which) as u64,
            0.125,
        )
    }

    /// The same as the weight stands for them.
    fn weight(self, which: usize, expert: usize) -> Vec<f32> {
        let raw = self.raw(which, expert);
        match self.held {
            Held::Dense => raw,
            Held::Nf4 => nf4_values(self.dims()[which], &raw, false).unwrap_or_default(),
            Held::NestedNf4 => nf4_values(self.dims()[which], &raw, true).unwrap_or_default(),
        }
    }

    fn experts(self, stage: &Stage<'_>) -> Result<Experts> {
        let of = |which: usize| -> Result<Vec<Weight>> {
            let one = |expert| {
                let (raw, dims) = (self.raw(which, expert), self.dims()[which]);
                Ok(match self.held {
                    Held::Dense => Weight::Dense(Tensor::from_f32("expert", &dims, raw)?),
                    Held::Nf4 | Held::NestedNf4 => {
                        let nested = self.held == Held::NestedNf4;
                        Weight::Nf4(Nf4Matrix::quantize("expert", &raw, dims, nested)?)
                    }
                })
            };
            (0..self.num_experts).map(one).collect()
        };
        let [gate, up, down] = stage.ops.place_experts([of(0)?, of(1)?, of(2)?])?;
        Ok(Experts {
            gate,
            up,
            down,
            lora: self.lora(),
            hidden_size: self.hidden,
            intermediate_size: self.width,
        })
    }

    /// Expert of each slot, different ones for one token.
    fn ids(self) -> Vec<usize> {
        let mut draws = Draws::new(9, Stream::Synthetic, 4);
        let mut ids = Vec::new();
        for _ in 0..self.tokens {
            let mut all: Vec<usize> = (0..self.used_experts).collect();
            draws.shuffle(&mut all);
            ids.extend(&all[..self.top_k]);
        }
        ids
    }

    /// Slots in the order of their rows.
    fn slots(self) -> Vec<usize> {
        let ids = self.ids();
        let mut slots: Vec<usize> = (0..ids.len()).collect();
        slots.sort_by_key(|slot| (ids[*slot], *slot));
        slots
    }

    fn topk_weights(self) -> Vec<f32> {
        let mut draws = Draws::new(10, Stream::Synthetic, 4);
        (0..self.routed()).map(|_| draws.next_f32()).collect()
    }

    fn routing(self, stage: &Stage<'_>) -> Result<Routing> {
        let ids = self.ids();
        let slots = self.slots();
        let mut row_of_slot = vec![0; slots.len()];
        for (row, slot) in slots.iter().enumerate() {
            row_of_slot[*slot] = index(row);
        }
        let first = |expert: usize| index(ids.iter().filter(|id| **id < expert).count());
        let offsets: Vec<u32> = (0..=self.num_experts).map(first).collect();
        let per_slot = |name: &str, shape: &[usize], mut values: Vec<u32>| {
            values.resize(self.capacity * self.top_k, u32::MAX);
            stage.u32(name, shape, &values)
        };
        let (shape, slot) = ([self.capacity, self.top_k], [self.capacity * self.top_k]);
        Ok(Routing {
            topk_ids: per_slot("topk_ids", &shape, ids.iter().copied().map(index).collect())?,
            topk_weights: stage.rows_f32("topk_weights", shape, &self.topk_weights())?,
            expert_offsets: stage.u32("expert_offsets", &[offsets.len()], &offsets)?,
            slot_of_row: per_slot("slot_of_row", &slot, slots.into_iter().map(index).collect())?,
            row_of_slot: per_slot("row_of_slot", &slot, row_of_slot)?,
            num_experts: self.num_experts,
            num_experts_per_tok: self.top_k,
            norm_topk_prob: true,
        })
    }

    /// Routed activations with these values.
    fn routed_rows(
        self,
        stage: &Stage<'_>,
        name: &str,
        width: usize,
        values: &[f32],
    ) -> Result<Tensor> {
        stage.rows(name, [self.capacity * self.top_k, width], values)
    }

    fn routed_out(self, stage: &Stage<'_>, name: &str, width: usize) -> Result<Tensor> {
        stage.out(name, &[self.capacity * self.top_k, width])
    }

    /// Values of a routed activation.
    fn routed_values(self, width: usize, seed: u64) -> Vec<f32> {
        values(self.routed() * width, seed)
    }

    fn lora_tensor(self, stage: &Stage<'_>) -> Result<Tensor> {
        let (shape, values) = ([self.arena_len()], self.arena(2));
        if self.narrow_arena {
            stage.activation("lora", &shape, &values)
        } else {
            stage.f32("lora", &shape, &values)
        }
    }

    /// Gradients are f32 whatever the adapter is.
    fn d_lora_tensor(self, stage: &Stage<'_>) -> Result<Tensor> {
        stage.f32("d_lora", &[self.arena_len()], &self.arena(7))
    }

    fn oracle(self, round: fn(f64) -> f64) -> Oracle {
        Oracle { shape: self, round }
    }
}

fn gate_up_forward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = shape.state();
        stage.load(&state)?;
        let (routed, rank) = (shape.routed(), shape.lora().gate_up_rank());
        let x = values(shape.tokens * shape.hidden, 1);
        let x = stage.rows("x", [shape.capacity, shape.hidden], &x)?;
        let mut h = shape.routed_out(stage, "h", shape.width)?;
        let mut gate = shape.routed_out(stage, "gate", shape.width)?;
        let mut up = shape.routed_out(stage, "up", shape.width)?;
        let mut xa = shape.routed_out(stage, "xa", rank)?;
        stage.ops.moe_gate_up_forward(
            &mut h,
            &mut gate,
            &mut up,
            &mut xa,
            &x,
            &shape.routing(stage)?,
            &shape.experts(stage)?,
            &shape.lora_tensor(stage)?,
            &state,
        )?;
        Ok(Outputs::new()
            .activation("h", stage.read_rows(&h, routed)?)
            .activation("gate", stage.read_rows(&gate, routed)?)
            .activation("up", stage.read_rows(&up, routed)?)
            .activation("xa", stage.read_rows(&xa, routed)?))
    };
    let oracle = move || shape.oracle(exact).gate_up_forward();
    Case::new("moe_gate_up_forward", shape.label(), run, oracle)
}

fn gate_up_backward(shape: Shape, wanted: Wanted) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = shape.state();
        stage.load(&state)?;
        let (routed, rank) = (shape.routed(), shape.lora().gate_up_rank());
        let wide = [shape.capacity, shape.hidden];
        let x = stage.rows("x", wide, &values(shape.tokens * shape.hidden, 1))?;
        let own = |name, width, seed| {
            shape.routed_rows(stage, name, width, &shape.routed_values(width, seed))
        };
        let (mut gate, mut up) = (own("gate", shape.width, 3)?, own("up", shape.width, 4)?);
        let (xa, d_h) = (own("xa", rank, 5)?, own("d_h", shape.width, 6)?);
        let mut d_routed = shape.routed_out(stage, "d_routed", shape.hidden)?;
        let mut d_lora = shape.d_lora_tensor(stage)?;
        let mut d_x = match wanted {
            Wanted::Add => stage.rows("d_x", wide, &values(shape.tokens * shape.hidden, 8))?,
            Wanted::Skip | Wanted::Overwrite => stage.out("d_x", &wide)?,
        };
        stage.ops.moe_gate_up_backward(
            match wanted {
                Wanted::Skip => GradOut::Skip,
                Wanted::Overwrite => GradOut::Overwrite(&mut d_x),
                Wanted::Add => GradOut::Add(&mut d_x),
            },
            &mut d_lora,
            &mut d_routed,
            &d_h,
            &mut gate,
            &mut up,
            &xa,
            &x,
            &shape.routing(stage)?,
            &shape.experts(stage)?,
            &shape.lora_tensor(stage)?,
            &state,
        )?;
        let written = if wanted == Wanted::Skip {
            0
        } else {
            shape.tokens
        };
        Ok(Outputs::new()
            .activation("d_gate", stage.read_rows(&gate, routed)?)
            .activation("d_up", stage.read_rows(&up, routed)?)
            .f32("d_lora", stage.read(&d_lora)?)
            .activation("d_x", stage.read_rows(&d_x, written)?))
    };
    let oracle = move || shape.oracle(exact).gate_up_backward(wanted);
    let label = format!("{} {wanted:?}", shape.label());
    Case::new("moe_gate_up_backward", label, run, oracle)
}

fn down_forward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = shape.state();
        stage.load(&state)?;
        let rank = shape.lora().down_rank();
        let h = shape.routed_values(shape.width, 1);
        let h = shape.routed_rows(stage, "h", shape.width, &h)?;
        let mut out = stage.out("out", &[shape.capacity, shape.hidden])?;
        let mut expert_out = shape.routed_out(stage, "expert_out", shape.hidden)?;
        let mut xa = shape.routed_out(stage, "xa", rank)?;
        stage.ops.moe_down_forward(
            &mut out,
            &mut expert_out,
            &mut xa,
            &h,
            &shape.routing(stage)?,
            &shape.experts(stage)?,
            &shape.lora_tensor(stage)?,
            &state,
        )?;
        Ok(Outputs::new()
            .activation("out", stage.read_rows(&out, shape.tokens)?)
            .activation("xa", stage.read_rows(&xa, shape.routed())?))
    };
    let oracle = move || shape.oracle(exact).down_forward();
    Case::new("moe_down_forward", shape.label(), run, oracle)
}

fn down_backward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = shape.state();
        stage.load(&state)?;
        let wide = [shape.capacity, shape.hidden];
        let d_out = stage.rows("d_out", wide, &values(shape.tokens * shape.hidden, 3))?;
        let own = |name, width, seed| {
            shape.routed_rows(stage, name, width, &shape.routed_values(width, seed))
        };
        let h = own("h", shape.width, 1)?;
        let xa = own("xa", shape.lora().down_rank(), 5)?;
        let mut d_h = shape.routed_out(stage, "d_h", shape.width)?;
        let mut d_weights = stage.out_f32("d_topk_weights", &[shape.capacity, shape.top_k])?;
        let mut d_lora = shape.d_lora_tensor(stage)?;
        stage.ops.moe_down_backward(
            &mut d_h,
            &mut d_weights,
            &mut d_lora,
            &d_out,
            &h,
            &xa,
            &shape.routing(stage)?,
            &shape.experts(stage)?,
            &shape.lora_tensor(stage)?,
            &state,
        )?;
        Ok(Outputs::new()
            .activation("d_h", stage.read_rows(&d_h, shape.routed())?)
            .f32("d_topk_weights", stage.read_rows(&d_weights, shape.tokens)?)
            .f32("d_lora", stage.read(&d_lora)?))
    };
    let oracle = move || shape.oracle(exact).down_backward();
    // The CPU keeps a row's weighted gradient in f32 between its products.
    let naive = move || shape.oracle(to_bf16).down_backward();
    Case::new("moe_down_backward", shape.label(), run, oracle).naive(naive)
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let plain = Shape {
        tokens: 1,
        capacity: 1,
        num_experts: 4,
        top_k: 1,
        hidden: 64,
        width: 32,
        held: Held::Dense,
        ranks: [0; 3],
        dropout: 0.0,
        used_experts: 4,
        arena_start: 8,
        narrow_arena: false,
    };
    let shapes = [
        plain,
        // Experts of several sizes, one without tokens; scales nested.
        Shape {
            tokens: 37,
            capacity: 41,
            top_k: 2,
            width: 64,
            held: Held::NestedNf4,
            ranks: [8; 3],
            used_experts: 3,
            ..plain
        },
        // NF4 blocks that cross rows of down; ranks that differ, and an arena off 16-byte borders.
        Shape {
            tokens: 67,
            capacity: 70,
            num_experts: 3,
            used_experts: 3,
            width: 96,
            held: Held::Nf4,
            ranks: [4, 16, 5],
            dropout: 0.25,
            arena_start: 3,
            ..plain
        },
        // The same of an adapter in bf16, off 16-byte borders too.
        Shape {
            tokens: 13,
            capacity: 15,
            num_experts: 3,
            used_experts: 3,
            width: 32,
            ranks: [4, 16, 5],
            dropout: 0.25,
            arena_start: 3,
            narrow_arena: true,
            ..plain
        },
        // Tiles of 128 rows, all on one of two experts; more ranks than a stage is deep.
        Shape {
            tokens: 129,
            capacity: 513,
            num_experts: 2,
            used_experts: 1,
            width: 128,
            held: Held::NestedNf4,
            ranks: [8, 0, 68],
            dropout: 0.25,
            ..plain
        },
        Shape {
            tokens: 63,
            capacity: 64,
            num_experts: 8,
            used_experts: 8,
            top_k: 3,
            hidden: 72,
            width: 40,
            ranks: [0, 24, 0],
            dropout: 0.5,
            ..plain
        },
        Shape {
            tokens: 65,
            capacity: 256,
            num_experts: 1,
            used_experts: 1,
            hidden: 136,
            width: 136,
            ranks: [8, 0, 8],
            ..plain
        },
    ];
    let wanted = [Wanted::Skip, Wanted::Add, Wanted::Overwrite];
    let mut cases = Vec::new();
    for (number, shape) in shapes.into_iter().enumerate() {
        cases.push(gate_up_forward(shape));
        cases.push(gate_up_backward(shape, wanted[number % 3]));
        cases.push(down_forward(shape));
        cases.push(down_backward(shape));
    }
    cases
}
