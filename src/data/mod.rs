//! Data: records of many formats to token sequences with targets, to packed batches.
//!
//! `jsonl --> records --> template (chat) --> sequences (tokens, labels) --> pack --> Batch`. Start at [`Dataset::load`].

pub mod calendar;
mod dataset;
mod json;
pub mod pack;
pub mod records;
mod report;
pub mod sequences;
pub mod template;
pub mod tokenizer;

pub use dataset::Dataset;
pub use report::{Report, Segment};

/// Label of a token that is not trained on.
pub const IGNORE_INDEX: i32 = -100;

/// A tokenised piece of the data set that fits `sequence_len`: one text, or (part of) a conversation.
///
/// Target `i` owns the labels in `target_ends[i - 1]..target_ends[i]`. Any run of consecutive targets can be cut out
/// as a window `input_ids[..target_ends[last]]` with the labels before `target_ends[first - 1]` ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unit {
    /// Tokens.
    pub input_ids: Vec<u32>,
    /// Per token its own id where it is trained on, else [`IGNORE_INDEX`] (unshifted, as Hugging Face has them).
    pub labels: Vec<i32>,
    /// End (exclusive token index) of each target turn; at least one, ascending, the last at most `input_ids.len()`.
    pub target_ends: Vec<usize>,
    /// Data set file (index into the config's list) and 1-based line of the record the unit came from.
    pub source: (usize, usize),
    /// Units of one conversation have the same number: they are never on both sides of a held-out split.
    pub group: usize,
}

/// Sequences run through the model together, laid end to end without padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[num_tokens]`.
    pub input_ids: Vec<u32>,
    /// `[num_tokens]`: the token each position must predict (labels shifted left by one within their sequence), or
    /// [`IGNORE_INDEX`]; always ignored at a sequence's last position.
    pub target_ids: Vec<i32>,
    /// `[num_sequences + 1]`: where each sequence begins; first 0, last `num_tokens`; strictly ascending.
    pub cu_seqlens: Vec<u32>,
    /// `[num_tokens]`: position within the sequence, from 0.
    pub position_ids: Vec<u32>,
}

impl Batch {
    /// `input_ids` in sequences of `sequence_len` tokens (at least 1), the last one as long as is left; every token but the last of
    /// its sequence must predict the next one.
    pub fn next_token(input_ids: Vec<u32>, sequence_len: usize) -> Self {
        let word = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let (len, sequence_len) = (input_ids.len(), sequence_len.max(1));
        let is_last = |at: usize| (at + 1).is_multiple_of(sequence_len) || at + 1 == len;
        let target = |at: usize| {
            if is_last(at) {
                IGNORE_INDEX
            } else {
                input_ids[at + 1].cast_signed()
            }
        };
        let mut cu_seqlens: Vec<u32> = (0..len).step_by(sequence_len).map(word).collect();
        cu_seqlens.push(word(len));
        Self {
            target_ids: (0..len).map(target).collect(),
            cu_seqlens,
            position_ids: (0..len).map(|at| word(at % sequence_len)).collect(),
            input_ids,
        }
    }
}

/// The batches of one optimizer step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepBatches {
    /// In order; gradients accumulate over them.
    pub micro_batches: Vec<Batch>,
    /// Tokens trained on over all of them.
    pub num_target_tokens: usize,
}
