//! What was found in the data sets: formats, what was left out and why, lengths, a sample with its mask.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::Unit;
use super::dataset::is_learnt;
use super::records::{Records, Skipped};
use super::sequences::Units;
use super::tokenizer::Tokenizer;
use crate::error::Error;

/// Upper ends of the histogram's buckets, in tokens.
const BUCKETS: [usize; 8] = [64, 128, 256, 512, 1024, 2048, 4096, 8192];
/// Lines named per reason.
const LINES_NAMED: usize = 5;
/// Reasons named in the error for a data set with nothing in it.
const REASONS_NAMED: usize = 3;

/// A stretch of the sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Whether it is learnt.
    pub is_target: bool,
    /// Text, or token ids where there is no tokenizer.
    pub text: String,
}

/// Report of the data sets of a run.
#[derive(Debug, Clone)]
pub struct Report {
    paths: Vec<PathBuf>,
    /// Records by format.
    pub formats: BTreeMap<&'static str, usize>,
    /// Records (or single targets) left out.
    pub skipped: Vec<Skipped>,
    /// Sequences.
    pub num_sequences: usize,
    /// Targets: assistant turns, completions, texts.
    pub num_targets: usize,
    /// Tokens, each sequence once.
    pub num_tokens: usize,
    /// Tokens that are learnt.
    pub num_target_tokens: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Sequences per bucket of length; the last is all longer ones.
    pub histogram: [usize; BUCKETS.len() + 1],
    /// Targets whose oldest turns were dropped, by file and line.
    pub truncated: Vec<(usize, usize)>,
    /// Pairs that share a sequence with the pair before them.
    pub num_folded: usize,
    /// Conversations that could not be folded.
    pub num_unfoldable: usize,
    /// Header lines.
    pub num_headers: usize,
    /// Pairs whose repeated user turn was removed.
    pub num_repeated_user_turns: usize,
    /// Pairs whose two user turns were merged.
    pub num_merged_user_turns: usize,
    /// Halves of characters replaced.
    pub num_lone_surrogates: usize,
    /// The template has no system role: system turns went into the first user turn.
    pub merges_system: bool,
    /// The first sequence, learnt parts marked.
    pub sample: Vec<Segment>,
}

impl Report {
    pub(super) fn new(
        paths: Vec<PathBuf>,
        records: &Records,
        made: &Units,
        merges_system: bool,
        tokenizer: Option<&Tokenizer>,
    ) -> Self {
        let mut formats = BTreeMap::new();
        for record in &records.records {
            *formats.entry(record.format.name()).or_insert(0) += 1;
        }
        let mut skipped = records.skipped.clone();
        skipped.extend(made.skipped.iter().cloned());
        skipped.sort_by_key(|one| one.source);
        let mut histogram = [0; BUCKETS.len() + 1];
        for unit in &made.units {
            histogram[BUCKETS.partition_point(|end| *end < unit.input_ids.len())] += 1;
        }
        let lengths = || made.units.iter().map(|unit| unit.input_ids.len());
        let learnt = |unit: &Unit| {
            unit.labels
                .iter()
                .skip(1)
                .filter(|label| is_learnt(**label))
                .count()
        };
        Self {
            paths,
            formats,
            skipped,
            num_sequences: made.units.len(),
            num_targets: made.units.iter().map(|unit| unit.target_ends.len()).sum(),
            num_tokens: lengths().sum(),
            num_target_tokens: made.units.iter().map(learnt).sum(),
            longest: lengths().max().unwrap_or(0),
            histogram,
            truncated: made.truncated.clone(),
            num_folded: made.num_folded,
            num_unfoldable: made.num_unfoldable,
            num_headers: records.num_headers,
            num_repeated_user_turns: records.num_repeated_user_turns,
            num_merged_user_turns: records.num_merged_user_turns,
            num_lone_surrogates: records.num_lone_surrogates,
            merges_system,
            sample: made
                .units
                .first()
                .map(|unit| sample(unit, tokenizer))
                .unwrap_or_default(),
        }
    }

    /// The error for a data set without anything to train on: the first reasons, with their lines.
    pub(super) fn nothing_to_train(&self) -> Error {
        let path = self.paths.first().cloned().unwrap_or_default();
        let mut reason = "no record can be trained on".to_owned();
        if self.skipped.is_empty() {
            reason.push_str("; the file has none");
        }
        for one in self.skipped.iter().take(REASONS_NAMED) {
            reason.push_str(&format!("\n  {}: {}", self.place(one.source), one.reason));
        }
        if self.skipped.len() > REASONS_NAMED {
            reason.push_str(&format!(
                "\n  and {} more",
                self.skipped.len() - REASONS_NAMED
            ));
        }
        Error::Data {
            path,
            line: None,
            reason,
        }
    }

    fn place(&self, (file, line): (usize, usize)) -> String {
        match self.paths.as_slice() {
            [_] => format!("line {line}"),
            paths => format!("{} line {line}", paths[file].display()),
        }
    }

    fn places(&self, sources: &[(usize, usize)]) -> String {
        let named = sources
            .iter()
            .take(LINES_NAMED)
            .map(|source| self.place(*source));
        let mut text = named.collect::<Vec<_>>().join(", ");
        if sources.len() > LINES_NAMED {
            text.push_str(&format!(" and {} more", sources.len() - LINES_NAMED));
        }
        text
    }

    /// What a reader should know before training, one line each.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let mut by_reason: Vec<(&str, Vec<(usize, usize)>)> = Vec::new();
        for one in &self.skipped {
            match by_reason
                .iter_mut()
                .find(|(reason, _)| *reason == one.reason)
            {
                Some((_, sources)) => sources.push(one.source),
                None => by_reason.push((&one.reason, vec![one.source])),
            }
        }
        for (reason, sources) in by_reason {
            notes.push(format!(
                "skipped {}: {reason} ({})",
                sources.len(),
                self.places(&sources)
            ));
        }
        let mut note = |count: usize, text: &str| {
            if count > 0 {
                notes.push(format!("{count} {text}"));
            }
        };
        note(self.num_headers, "header line(s) `_meta`, not counted");
        note(
            self.num_repeated_user_turns,
            "pair(s) repeated the user turn at the end of their history; it is used once",
        );
        note(
            self.num_merged_user_turns,
            "pair(s) had a history that ends with another user turn; the two were merged",
        );
        note(
            self.num_lone_surrogates,
            "half character(s) (lone surrogates) were replaced by U+FFFD",
        );
        note(
            self.num_folded,
            "pair(s) share the sequence of the pair before them in the conversation",
        );
        note(
            self.num_unfoldable,
            "conversation(s) not folded: the template renders earlier turns differently",
        );
        if !self.truncated.is_empty() {
            let places = self.places(&self.truncated);
            notes.push(format!(
                "truncated {}: oldest turns dropped to fit `sequence_len` ({places})",
                self.truncated.len()
            ));
        }
        if self.merges_system {
            let text = "the chat template has no system role: a system turn goes in front of the first user turn";
            notes.push(text.to_owned());
        }
        notes
    }
}

/// The stretches of `unit` that are learnt and those that are not.
fn sample(unit: &Unit, tokenizer: Option<&Tokenizer>) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut start = 0;
    while start < unit.labels.len() {
        let is_target = is_learnt(unit.labels[start]);
        let same = unit.labels[start..]
            .iter()
            .take_while(|label| is_learnt(**label) == is_target);
        let end = start + same.count();
        let ids = &unit.input_ids[start..end];
        let text = match tokenizer {
            Some(tokenizer) => tokenizer.decode(ids),
            None => format!("{ids:?}"),
        };
        segments.push(Segment { is_target, text });
        start = end;
    }
    segments
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for path in &self.paths {
            writeln!(f, "data set       {}", path.display())?;
        }
        let formats = self
            .formats
            .iter()
            .map(|(format, count)| format!("{count} {format}"));
        writeln!(
            f,
            "records        {}",
            formats.collect::<Vec<_>>().join(", ")
        )?;
        writeln!(
            f,
            "targets        {} in {} sequences",
            self.num_targets, self.num_sequences
        )?;
        let share = 100.0 * self.num_target_tokens as f64 / self.num_tokens.max(1) as f64;
        writeln!(
            f,
            "tokens         {}, of which {} ({share:.0} %) are learnt; longest sequence {}",
            self.num_tokens, self.num_target_tokens, self.longest
        )?;
        let most = self.histogram.iter().copied().max().unwrap_or(0).max(1);
        for (bucket, count) in self
            .histogram
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
        {
            let label = match BUCKETS.get(bucket) {
                Some(end) => format!("<= {end}"),
                None => format!("> {}", BUCKETS[BUCKETS.len() - 1]),
            };
            writeln!(
                f,
                "  {label:>8} tokens {count:>6} {}",
                "#".repeat((40 * count).div_ceil(most))
            )?;
        }
        for note in self.notes() {
            writeln!(f, "note           {note}")?;
        }
        writeln!(f, "first sequence ([[ ]] is learnt):")?;
        for segment in &self.sample {
            if segment.is_target {
                write!(f, "[[{}]]", segment.text)?;
            } else {
                write!(f, "{}", segment.text)?;
            }
        }
        writeln!(f)
    }
}
