//! Cases of `attention` and `attention_gate`.

use super::stage::{scaled, state, values};
use super::{Case, Outputs, Stage};
use crate::error::Result;
use crate::ops::{AttentionSpec, StepState};

/// One call: heads, what they see, and the packed sequences.
#[derive(Debug, Clone)]
struct Call {
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    window: Option<usize>,
    lengths: Vec<usize>,
    /// Factor of q: above 1 a few scores decide, and the maximum grows from block to block.
    strength: f32,
    spare_rows: usize,
}

fn call([head_dim, heads, kv_heads]: [usize; 3], window: Option<usize>, lengths: &[usize]) -> Call {
    Call {
        head_dim,
        heads,
        kv_heads,
        window,
        lengths: lengths.to_vec(),
        strength: 1.0,
        spare_rows: 9,
    }
}

/// Every size of head, ratio of heads and window; borders of sequences inside and at tiles.
fn calls() -> Vec<Call> {
    let full = Call {
        spare_rows: 0,
        ..call([64, 2, 1], None, &[64])
    };
    let strong = |call: Call| Call {
        strength: 8.0,
        ..call
    };
    vec![
        call([16, 2, 1], None, &[1]),
        call([32, 2, 2], None, &[7]),
        call([48, 4, 1], Some(5), &[63]),
        full,
        call([64, 4, 2], Some(24), &[65]),
        call([80, 2, 1], Some(2), &[30, 5]),
        call([96, 1, 1], None, &[64, 33]),
        call([128, 2, 1], None, &[40, 60, 30]),
        call([160, 1, 1], None, &[33]),
        call([256, 2, 1], None, &[20, 45]),
        call([256, 1, 1], Some(5), &[70, 61]),
        call([32, 1, 1], Some(24), &[130, 100]),
        strong(call([32, 8, 1], None, &[3, 50, 1, 76])),
        strong(call([16, 1, 1], None, &[300])),
    ]
}

impl Call {
    fn spec(&self) -> AttentionSpec {
        AttentionSpec {
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.head_dim,
            output_gate: false,
            sliding_window: self.window,
            qk_norm: None,
            rotary_dim: self.head_dim,
        }
    }

    fn label(&self) -> String {
        let window = self.window.map_or("all".to_owned(), |w| w.to_string());
        format!(
            "head_dim={},heads={}/{},window={window},lengths={:?},strength={}",
            self.head_dim, self.heads, self.kv_heads, self.lengths, self.strength
        )
    }

    fn state(&self) -> StepState {
        state(&self.lengths, 100, 1)
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn capacity(&self) -> usize {
        self.tokens() + self.spare_rows
    }

    /// Elements of a row of q, and of k.
    fn widths(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    /// The keys that `query` sees.
    fn keys(&self, query: usize) -> std::ops::RangeInclusive<usize> {
        let mut start = 0;
        for length in &self.lengths {
            if query < start + length {
                break;
            }
            start += length;
        }
        let reach = self
            .window
            .map_or(0, |window| (query + 1).saturating_sub(window));
        start.max(reach)..=query
    }
}

/// Inputs, all bf16 numbers but `lse`.
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
    /// What forward left.
    o: Vec<f32>,
    lse: Vec<f32>,
}

/// Results of forward in f64.
struct Attended {
    o: Vec<f64>,
    lse: Vec<f64>,
}

fn inputs(call: &Call) -> Inputs {
    let (q_width, k_width) = call.widths();
    let tokens = call.tokens();
    let mut inputs = Inputs {
        q: scaled(tokens * q_width, 2, call.strength),
        k: values(tokens * k_width, 3),
        v: values(tokens * k_width, 4),
        d_o: values(tokens * q_width, 5),
        o: Vec::new(),
        lse: Vec::new(),
    };
    let attended = attend(call, &inputs, exact);
    inputs.o = attended.o.iter().map(|o| bf16(*o) as f32).collect();
    inputs.lse = attended.lse.iter().map(|lse| *lse as f32).collect();
    inputs
}

/// Keeps everything: the reference.
fn exact(value: f64) -> f64 {
    value
}

/// Rounds as an implementation does that stores every intermediate in bf16: the naive one.
fn bf16(value: f64) -> f64 {
    half::bf16::from_f64(value).to_f64()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum()
}

/// Head `head` of row `row`.
fn head_of<T>(data: &[T], row: usize, num_heads: usize, head: usize, head_dim: usize) -> &[T] {
    &data[(row * num_heads + head) * head_dim..][..head_dim]
}

/// Scaled scores of a query's keys.
fn scores(call: &Call, inputs: &Inputs, query: usize, head: usize) -> Vec<f64> {
    let kv_head = head * call.kv_heads / call.heads;
    let q = head_of(&inputs.q, query, call.heads, head, call.head_dim);
    let key = |key| head_of(&inputs.k, key, call.kv_heads, kv_head, call.head_dim);
    let scale = 1.0 / (call.head_dim as f64).sqrt();
    call.keys(query).map(|at| dot(q, key(at)) * scale).collect()
}

fn log_sum_exp(scores: &[f64]) -> f64 {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let terms = scores.iter().map(|score| (score - max).exp());
    max + terms.sum::<f64>().ln()
}

/// Softmax of a query's scores.
fn probabilities(scores: &[f64], round: fn(f64) -> f64) -> Vec<f64> {
    let scores: Vec<f64> = scores.iter().map(|score| round(*score)).collect();
    let lse = log_sum_exp(&scores);
    let terms = scores.iter().map(|score| round((score - lse).exp()));
    terms.collect()
}

fn attend(call: &Call, inputs: &Inputs, round: fn(f64) -> f64) -> Attended {
    let (tokens, head_dim) = (call.tokens(), call.head_dim);
    let mut attended = Attended {
        o: vec![0.0; tokens * call.heads * head_dim],
        lse: vec![0.0; tokens * call.heads],
    };
    for query in 0..tokens {
        for head in 0..call.heads {
            let kv_head = head * call.kv_heads / call.heads;
            let at = query * call.heads + head;
            let scores = scores(call, inputs, query, head);
            attended.lse[at] = log_sum_exp(&scores);
            let out = &mut attended.o[at * head_dim..][..head_dim];
            for (key, p) in call.keys(query).zip(probabilities(&scores, round)) {
                let v = head_of(&inputs.v, key, call.kv_heads, kv_head, head_dim);
                for (out, v) in out.iter_mut().zip(v) {
                    *out += p * f64::from(*v);
                }
            }
            out.iter_mut().for_each(|out| *out = round(*out));
        }
    }
    attended
}

/// `d_q`, `d_k`, `d_v`.
fn backward(call: &Call, inputs: &Inputs, round: fn(f64) -> f64) -> [Vec<f64>; 3] {
    let (tokens, head_dim) = (call.tokens(), call.head_dim);
    let (q_width, k_width) = call.widths();
    let mut d_q = vec![0.0; tokens * q_width];
    let mut d_k = vec![0.0; tokens * k_width];
    let mut d_v = vec![0.0; tokens * k_width];
    let scale = 1.0 / (head_dim as f64).sqrt();
    for query in 0..tokens {
        for head in 0..call.heads {
            let kv_head = head * call.kv_heads / call.heads;
            let q = head_of(&inputs.q, query, call.heads, head, head_dim);
            let d_o = head_of(&inputs.d_o, query, call.heads, head, head_dim);
            let o = head_of(&inputs.o, query, call.heads, head, head_dim);
            let delta = round(dot(d_o, o));
            let scores = scores(call, inputs, query, head);
            for (key, p) in call.keys(query).zip(probabilities(&scores, round)) {
                let k = head_of(&inputs.k, key, call.kv_heads, kv_head, head_dim);
                let v = head_of(&inputs.v, key, call.kv_heads, kv_head, head_dim);
                let d_s = round(p * (round(dot(d_o, v)) - delta)) * scale;
                let (at_q, at_k) = (
                    (query * call.heads + head) * head_dim,
                    (key * call.kv_heads + kv_head) * head_dim,
                );
                for i in 0..head_dim {
                    d_q[at_q + i] += d_s * f64::from(k[i]);
                    d_k[at_k + i] += d_s * f64::from(q[i]);
                    d_v[at_k + i] += p * f64::from(d_o[i]);
                }
            }
        }
    }
    [d_q, d_k, d_v].map(|grad| grad.into_iter().map(round).collect())
}

fn run_forward(call: &Call, stage: &Stage<'_>) -> Result<Outputs> {
    let (state, inputs) = (call.state(), inputs(call));
    let (capacity, (q_width, k_width)) = (call.capacity(), call.widths());
    stage.load(&state)?;
    let q = stage.rows("q", [capacity, q_width], &inputs.q)?;
    let k = stage.rows("k", [capacity, k_width], &inputs.k)?;
    let v = stage.rows("v", [capacity, k_width], &inputs.v)?;
    let mut o = stage.out("o", &[capacity, q_width])?;
    let mut lse = stage.out_f32("lse", &[capacity, call.heads])?;
    let ops = stage.ops;
    ops.attention_forward(&mut o, &mut lse, &q, &k, &v, call.spec(), &state)?;
    Ok(Outputs::new()
        .activation("o", stage.read_rows(&o, call.tokens())?)
        .f32("lse", stage.read_rows(&lse, call.tokens())?))
}

fn expected_forward(call: &Call, round: fn(f64) -> f64) -> Outputs {
    let attended = attend(call, &inputs(call), round);
    Outputs::new()
        .activation("o", attended.o)
        .f32("lse", attended.lse)
}

fn run_backward(call: &Call, stage: &Stage<'_>) -> Result<Outputs> {
    let (state, inputs) = (call.state(), inputs(call));
    let (capacity, (q_width, k_width)) = (call.capacity(), call.widths());
    stage.load(&state)?;
    let q = stage.rows("q", [capacity, q_width], &inputs.q)?;
    let k = stage.rows("k", [capacity, k_width], &inputs.k)?;
    let v = stage.rows("v", [capacity, k_width], &inputs.v)?;
    let d_o = stage.rows("d_o", [capacity, q_width], &inputs.d_o)?;
    let o = stage.rows("o", [capacity, q_width], &inputs.o)?;
    let lse = stage.rows_f32("lse", [capacity, call.heads], &inputs.lse)?;
    let mut d_q = stage.out("d_q", &[capacity, q_width])?;
    let mut d_k = stage.out("d_k", &[capacity, k_width])?;
    let mut d_v = stage.out("d_v", &[capacity, k_width])?;
    stage.ops.attention_backward(
        &mut d_q,
        &mut d_k,
        &mut d_v,
        &d_o,
        &o,
        &lse,
        &q,
        &k,
        &v,
        call.spec(),
        &state,
    )?;
    Ok(Outputs::new()
        .activation("d_q", stage.read_rows(&d_q, call.tokens())?)
        .activation("d_k", stage.read_rows(&d_k, call.tokens())?)
        .activation("d_v", stage.read_rows(&d_v, call.tokens())?))
}

fn expected_backward(call: &Call, round: fn(f64) -> f64) -> Outputs {
    let [d_q, d_k, d_v] = backward(call, &inputs(call), round);
    Outputs::new()
        .activation("d_q", d_q)
        .activation("d_k", d_k)
        .activation("d_v", d_v)
}

type Run = fn(&Call, &Stage<'_>) -> Result<Outputs>;
type Expected = fn(&Call, fn(f64) -> f64) -> Outputs;

fn case(op: &'static str, call: &Call, run: Run, expected: Expected) -> Case {
    let [runs, oracle, naive] = [call.clone(), call.clone(), call.clone()];
    Case::new(
        op,
        call.label(),
        move |stage| run(&runs, stage),
        move || expected(&oracle, exact),
    )
    .naive(move || expected(&naive, bf16))
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    // A query that sees only itself has no d_q: rounding is all there is.
    let itself = call([80, 2, 1], Some(1), &[30, 5]);
    let forward = calls().into_iter().chain([itself]);
    let forward =
        forward.map(|call| case("attention_forward", &call, run_forward, expected_forward));
    let backward = calls().into_iter();
    let backward =
        backward.map(|call| case("attention_backward", &call, run_backward, expected_backward));
    let gates = [([16, 2], 1), ([48, 3], 7), ([256, 1], 5), ([64, 2], 33)];
    let gates = gates.map(|([head_dim, heads], tokens)| gate_case(head_dim, heads, tokens));
    forward
        .chain(backward)
        .chain(gates.into_iter().flatten())
        .collect()
}

/// Splits rows of `[heads, 2, head_dim]` into their first and second halves.
fn halves(values: &[f64], head_dim: usize) -> [Vec<f64>; 2] {
    let half = |which: usize| {
        let heads = values.chunks(2 * head_dim);
        heads
            .flat_map(|head| &head[which * head_dim..][..head_dim])
            .copied()
            .collect()
    };
    [half(0), half(1)]
}

/// Both directions of the gate.
fn gate_case(head_dim: usize, heads: usize, tokens: usize) -> [Case; 2] {
    let spec = AttentionSpec {
        output_gate: true,
        ..call([head_dim, heads, 1], None, &[tokens]).spec()
    };
    let (width, capacity) = (heads * head_dim, tokens + 3);
    let o = values(tokens * width, 6);
    let q_proj = scaled(2 * tokens * width, 7, 2.0);
    let d_y = values(tokens * width, 8);
    let gate: Vec<f64> = q_proj
        .chunks(2 * head_dim)
        .flat_map(|head| &head[head_dim..])
        .map(|x| 1.0 / (1.0 + f64::from(-*x).exp()))
        .collect();
    let product = |a: &[f32], b: &[f64]| -> Vec<f64> {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).collect()
    };
    let y = product(&o, &gate);
    let d_o = product(&d_y, &gate);
    let slope: Vec<f64> = gate
        .iter()
        .zip(&o)
        .map(|(s, o)| f64::from(*o) * s * (1.0 - s))
        .collect();
    let d_gate = product(&d_y, &slope);
    let label = format!("head_dim={head_dim},heads={heads},tokens={tokens}");
    let inputs = (o, q_proj);
    let (o, q_proj) = inputs.clone();
    let forward = move |stage: &Stage<'_>| {
        let state = state(&[tokens], 100, 1);
        stage.load(&state)?;
        let o = stage.rows("o", [capacity, width], &o)?;
        let q_proj = stage.rows("q_proj", [capacity, 2 * width], &q_proj)?;
        let mut y = stage.out("y", &[capacity, width])?;
        stage
            .ops
            .attention_gate_forward(&mut y, &o, &q_proj, spec, &state)?;
        Ok(Outputs::new().activation("y", stage.read_rows(&y, tokens)?))
    };
    let (o, q_proj) = inputs;
    let backward = move |stage: &Stage<'_>| {
        let state = state(&[tokens], 100, 1);
        stage.load(&state)?;
        let o = stage.rows("o", [capacity, width], &o)?;
        let q_proj = stage.rows("q_proj", [capacity, 2 * width], &q_proj)?;
        let d_y = stage.rows("d_y", [capacity, width], &d_y)?;
        let mut d_o = stage.out("d_o", &[capacity, width])?;
        let mut d_q_proj = stage.out("d_q_proj", &[capacity, 2 * width])?;
        let ops = stage.ops;
        ops.attention_gate_backward(&mut d_o, &mut d_q_proj, &d_y, &o, &q_proj, spec, &state)?;
        let [query, gate] = halves(&stage.read_rows(&d_q_proj, tokens)?, head_dim);
        let left_alone = query.iter().map(|value| u32::from(value.is_nan()));
        Ok(Outputs::new()
            .activation("d_o", stage.read_rows(&d_o, tokens)?)
            .activation("d_gate", gate)
            .exact("left_alone", left_alone.collect()))
    };
    [
        Case::new(
            "attention_gate_forward",
            label.clone(),
            forward,
            move || Outputs::new().activation("y", y.clone()),
        ),
        Case::new("attention_gate_backward", label, backward, move || {
            Outputs::new()
                .activation("d_o", d_o.clone())
                .activation("d_gate", d_gate.clone())
                .exact("left_alone", vec![1; tokens * width])
        }),
    ]
}
