//! Records to units: rendered, tokenised, labelled, folded, cut to `sequence_len`.

use std::ops::Range;

use super::records::{Body, Record, Skipped};
use super::template::{ChatTemplate, Message};
use super::tokenizer::{Tokenizer, Tokens};
use super::{IGNORE_INDEX, Unit};
use crate::error::Result;

/// How records become units.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Longest unit.
    pub sequence_len: usize,
    /// One sequence per conversation, where its prefixes are equal.
    pub fold: bool,
    /// Labels on everything.
    pub train_on_inputs: bool,
    /// Ids the model has.
    pub vocab_size: usize,
}

/// Units and what happened on the way.
#[derive(Debug, Default)]
pub struct Units {
    /// Units, in the order of their records.
    pub units: Vec<Unit>,
    /// Records (or single targets) left out.
    pub skipped: Vec<Skipped>,
    /// Targets that lost the oldest turns of their context, by source.
    pub truncated: Vec<(usize, usize)>,
    /// Pairs that went into a sequence of another pair.
    pub num_folded: usize,
    /// Conversations that were not folded because the template renders their prefixes differently.
    pub num_unfoldable: usize,
}

/// A conversation with the turns to learn, each with the line it came from.
#[derive(Debug)]
struct Thread {
    messages: Vec<Message>,
    targets: Vec<(usize, (usize, usize))>,
    group: usize,
}

impl Thread {
    fn source_of(&self, target: usize) -> (usize, usize) {
        let found = self.targets.iter().find(|(index, _)| *index == target);
        found.map_or((0, 0), |(_, source)| *source)
    }
}

/// Why a conversation gave no sequence.
enum Refusal {
    /// The template or a target says so.
    Reason(String),
    /// Targets render differently inside the whole.
    Inconsistent,
}

/// A tokenised conversation.
struct Encoded {
    input_ids: Vec<u32>,
    labels: Vec<i32>,
    target_ends: Vec<usize>,
}

/// Makes units of `records`. `tokenizer` and `template` are `None` where only token rows are to be expected.
///
/// # Errors
/// Those of the tokenizer.
pub fn units(
    records: &[Record],
    rules: Rules,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
) -> Result<Units> {
    let mut out = Units::default();
    let mut threads: Vec<Thread> = Vec::new();
    let mut last_of = std::collections::HashMap::new();
    for (group, record) in records.iter().enumerate() {
        match (&record.body, tokenizer) {
            (Body::Tokens { input_ids, labels }, _) => {
                row(
                    &mut out,
                    rules,
                    record.source,
                    group,
                    input_ids,
                    labels.as_deref(),
                );
            }
            (Body::Text(text), Some(tokenizer)) => {
                let ids = ended(tokenizer, tokenizer.encode(text, true)?.ids);
                row(&mut out, rules, record.source, group, &ids, None);
            }
            (Body::Completion { prompt, completion }, Some(tokenizer)) => {
                let whole = tokenizer.encode(&format!("{prompt}{completion}"), true)?;
                let span = prompt.len()..prompt.len() + completion.len();
                let mut labels = labels_of(&whole, &[span], rules.train_on_inputs);
                let ids = ended(tokenizer, whole.ids);
                labels.extend(ids[labels.len()..].iter().map(|id| label(*id)));
                row(&mut out, rules, record.source, group, &ids, Some(&labels));
            }
            (
                Body::Chat {
                    conversation,
                    messages,
                    targets,
                },
                _,
            ) => {
                let key = conversation
                    .as_ref()
                    .map(|name| (record.source.0, name.clone()));
                let earlier = key.as_ref().and_then(|key| last_of.get(key).copied());
                let thread = Thread {
                    messages: messages.clone(),
                    targets: targets
                        .iter()
                        .map(|target| (*target, record.source))
                        .collect(),
                    group: earlier.map_or(group, |earlier: usize| threads[earlier].group),
                };
                let index = add_thread(&mut threads, earlier.filter(|_| rules.fold), thread);
                if let Some(key) = key {
                    last_of.insert(key, index);
                }
            }
            (Body::Text(_) | Body::Completion { .. }, None) => {}
        }
    }
    if let (Some(tokenizer), Some(template)) = (tokenizer, template) {
        let mut builder = ThreadUnits {
            out: &mut out,
            rules,
            tokenizer,
            template,
        };
        for thread in &threads {
            builder.add(thread)?;
        }
    }
    out.units.sort_by_key(|unit| unit.source);
    Ok(out)
}

/// Adds a conversation to the earlier thread it continues, or as a new one; the index it has.
fn add_thread(threads: &mut Vec<Thread>, earlier: Option<usize>, new: Thread) -> usize {
    if let Some(earlier) = earlier {
        let thread = &mut threads[earlier];
        let known = thread.messages.len();
        if new.messages.len() > known && new.messages.starts_with(&thread.messages) {
            thread.messages = new.messages;
            let added = new
                .targets
                .into_iter()
                .filter(|(target, _)| *target >= known);
            thread.targets.extend(added);
            return earlier;
        }
    }
    threads.push(new);
    threads.len() - 1
}

/// Units of a text or a token row: all labels can be cut anywhere, given ones lose context on the left only.
fn row(
    out: &mut Units,
    rules: Rules,
    source: (usize, usize),
    group: usize,
    ids: &[u32],
    labels: Option<&[i32]>,
) {
    let skip = |out: &mut Units, reason: String| out.skipped.push(Skipped { source, reason });
    if let Some(id) = ids.iter().find(|id| **id as usize >= rules.vocab_size) {
        let size = rules.vocab_size;
        return skip(
            out,
            format!("token id {id} is beyond the model's vocabulary of {size}"),
        );
    }
    let push = |out: &mut Units, ids: &[u32], labels: Vec<i32>| {
        let end = labels
            .iter()
            .rposition(|label| *label != IGNORE_INDEX)
            .map_or(0, |last| last + 1);
        if labels.iter().skip(1).all(|label| *label == IGNORE_INDEX) {
            return skip(out, "has no token to learn after the first".to_owned());
        }
        let input_ids = ids.to_vec();
        let target_ends = vec![end];
        out.units.push(Unit {
            input_ids,
            labels,
            target_ends,
            source,
            group,
        });
    };
    let all = |ids: &[u32]| ids.iter().map(|id| label(*id)).collect::<Vec<i32>>();
    match labels.filter(|_| !rules.train_on_inputs) {
        None => {
            for chunk in ids
                .chunks(rules.sequence_len)
                .filter(|chunk| chunk.len() > 1 || ids.len() == 1)
            {
                push(out, chunk, all(chunk));
            }
        }
        Some(labels) if ids.len() <= rules.sequence_len => push(out, ids, labels.to_vec()),
        Some(labels) => {
            let start = ids.len() - rules.sequence_len;
            if labels[..=start].iter().any(|label| *label != IGNORE_INDEX) {
                let reason = too_long(ids.len(), rules.sequence_len);
                return skip(out, reason);
            }
            out.truncated.push(source);
            push(out, &ids[start..], labels[start..].to_vec());
        }
    }
}

fn too_long(tokens: usize, sequence_len: usize) -> String {
    format!(
        "its target does not fit: {tokens} tokens, `sequence_len` is {sequence_len}; raise it to train on this record"
    )
}

/// A token's id as its own label.
fn label(id: u32) -> i32 {
    i32::try_from(id).unwrap_or(IGNORE_INDEX)
}

fn ended(tokenizer: &Tokenizer, mut ids: Vec<u32>) -> Vec<u32> {
    if let Some(eos) = tokenizer.eos_token_id.filter(|eos| ids.last() != Some(eos)) {
        ids.push(eos);
    }
    ids
}

/// Labels on the tokens that overlap one of `spans`, or on all.
fn labels_of(tokens: &Tokens, spans: &[Range<usize>], everything: bool) -> Vec<i32> {
    let inside = |offset: &Range<usize>| {
        spans.iter().any(|span| {
            if offset.is_empty() {
                // White space that the tokenizer trimmed away: its end is what is left of it.
                span.start < offset.end && offset.end <= span.end
            } else {
                offset.start < span.end && span.start < offset.end
            }
        })
    };
    let labels = tokens.ids.iter().zip(&tokens.offsets);
    labels
        .map(|(id, offset)| {
            if everything || inside(offset) {
                label(*id)
            } else {
                IGNORE_INDEX
            }
        })
        .collect()
}

struct ThreadUnits<'a> {
    out: &'a mut Units,
    rules: Rules,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
}

impl ThreadUnits<'_> {
    fn add(&mut self, thread: &Thread) -> Result<()> {
        let targets: Vec<usize> = thread.targets.iter().map(|(target, _)| *target).collect();
        let whole = if self.rules.fold || targets.len() == 1 {
            self.encode(&thread.messages, &targets)?
        } else {
            Err(Refusal::Inconsistent)
        };
        match whole {
            Ok(encoded) if encoded.input_ids.len() <= self.rules.sequence_len => {
                self.out.num_folded += targets.len() - 1;
                self.push(encoded, thread.targets[0].1, thread.group);
                Ok(())
            }
            Ok(_) => self.add_windows(thread, &targets),
            Err(Refusal::Reason(reason)) if targets.len() == 1 => {
                self.skip(thread.targets[0].1, reason);
                Ok(())
            }
            Err(refusal) => {
                if self.rules.fold && matches!(refusal, Refusal::Inconsistent) {
                    self.out.num_unfoldable += 1;
                }
                for one in &targets {
                    self.add_windows(thread, std::slice::from_ref(one))?;
                }
                Ok(())
            }
        }
    }

    /// Sequences of consecutive targets, each with as many turns before it as fit; every target learnt once.
    fn add_windows(&mut self, thread: &Thread, targets: &[usize]) -> Result<()> {
        let mut next = 0;
        while let Some(first) = targets.get(next) {
            let source = thread.source_of(*first);
            let (from, mut encoded) = match self.longest_context(thread, *first)? {
                Ok(found) => found,
                Err(reason) => {
                    self.skip(source, reason);
                    next += 1;
                    continue;
                }
            };
            let mut end = next + 1;
            while end < targets.len() {
                let longer = self.encode_from(thread, from, &targets[next..=end])?;
                match longer {
                    Ok(longer) if longer.input_ids.len() <= self.rules.sequence_len => {
                        encoded = longer;
                    }
                    _ => break,
                }
                end += 1;
            }
            if from > 0 {
                let sources = targets[next..end]
                    .iter()
                    .map(|target| thread.source_of(*target));
                let sources: Vec<_> = sources.collect();
                self.out.truncated.extend(sources);
            }
            self.out.num_folded += end - next - 1;
            self.push(encoded, source, thread.group);
            next = end;
        }
        Ok(())
    }

    /// Renders up to `target`, dropping as few of the oldest turns as makes it fit; the first turn kept, 0 for all.
    fn longest_context(
        &self,
        thread: &Thread,
        target: usize,
    ) -> Result<Result<(usize, Encoded), String>> {
        let starts = (1..target).filter(|index| thread.messages[*index].role == "user");
        let first_user = thread
            .messages
            .iter()
            .position(|message| message.role == "user");
        let mut shortest = 0;
        for from in std::iter::once(0).chain(starts.filter(|start| Some(*start) != first_user)) {
            match self.encode_from(thread, from, &[target])? {
                Ok(encoded) if encoded.input_ids.len() <= self.rules.sequence_len => {
                    return Ok(Ok((from, encoded)));
                }
                Ok(encoded) => shortest = encoded.input_ids.len(),
                Err(Refusal::Reason(reason)) => return Ok(Err(reason)),
                Err(Refusal::Inconsistent) => {}
            }
        }
        Ok(Err(too_long(shortest, self.rules.sequence_len)))
    }

    /// Encodes the system turn and the turns from `from` on.
    fn encode_from(
        &self,
        thread: &Thread,
        from: usize,
        targets: &[usize],
    ) -> Result<std::result::Result<Encoded, Refusal>> {
        let has_system = thread.messages[0].role == "system";
        let kept = usize::from(has_system && from > 0);
        let mut messages = thread.messages[..kept].to_vec();
        messages.extend_from_slice(&thread.messages[from..]);
        let targets: Vec<usize> = targets.iter().map(|target| target - from + kept).collect();
        self.encode(&messages, &targets)
    }

    /// Renders, tokenises and labels `messages` up to the last of `targets`.
    fn encode(
        &self,
        messages: &[Message],
        targets: &[usize],
    ) -> Result<std::result::Result<Encoded, Refusal>> {
        let spans = match self.spans(messages, targets) {
            Ok(spans) => spans,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let (text, prefixes, spans) = spans;
        let tokens = self.tokenizer.encode(&text, false)?;
        for prefix in prefixes {
            let ids = self.tokenizer.encode(&text[..prefix], false)?.ids;
            if !tokens.ids.starts_with(&ids) {
                return Ok(Err(Refusal::Inconsistent));
            }
        }
        if let Some(id) = tokens
            .ids
            .iter()
            .find(|id| **id as usize >= self.rules.vocab_size)
        {
            let size = self.rules.vocab_size;
            let reason = format!("token id {id} is beyond the model's vocabulary of {size}");
            return Ok(Err(Refusal::Reason(reason)));
        }
        let only_targets = labels_of(&tokens, &spans, false);
        let mut target_ends = Vec::new();
        for span in &spans {
            let labels = labels_of(&tokens, std::slice::from_ref(span), false);
            match labels.iter().rposition(|label| *label != IGNORE_INDEX) {
                Some(last) if target_ends.last() != Some(&(last + 1)) => target_ends.push(last + 1),
                _ => {
                    let reason = "the template renders an assistant turn to nothing".to_owned();
                    return Ok(Err(Refusal::Reason(reason)));
                }
            }
        }
        let labels = if self.rules.train_on_inputs {
            labels_of(&tokens, &spans, true)
        } else {
            only_targets
        };
        let input_ids = tokens.ids;
        Ok(Ok(Encoded {
            input_ids,
            labels,
            target_ends,
        }))
    }

    /// The whole text, the ends of the inner targets' renderings, and the bytes of each target.
    #[expect(clippy::type_complexity, reason = "three parts of one rendering")]
    fn spans(
        &self,
        messages: &[Message],
        targets: &[usize],
    ) -> std::result::Result<(String, Vec<usize>, Vec<Range<usize>>), Refusal> {
        let render = |end: usize, prompt: bool| {
            self.template
                .render(&messages[..end], prompt)
                .map_err(Refusal::Reason)
        };
        let last = targets.last().copied().unwrap_or(0);
        let whole = render(last + 1, false)?;
        let (mut prefixes, mut spans) = (Vec::new(), Vec::new());
        for target in targets {
            let through = if *target == last {
                whole.clone()
            } else {
                render(target + 1, false)?
            };
            if !whole.text.starts_with(&through.text) {
                return Err(Refusal::Inconsistent);
            }
            if *target != last {
                prefixes.push(through.text.len());
            }
            let content = &messages[*target].content;
            if self.template.marks_generation() {
                let assistants = messages[..*target]
                    .iter()
                    .filter(|m| m.role == "assistant")
                    .count();
                let span = through
                    .generated
                    .get(assistants)
                    .or(through.generated.last());
                spans.extend(span.cloned());
            } else {
                let prompt = self.template.render(&messages[..*target], true);
                spans.push(target_span(
                    &through.text,
                    prompt.ok().map(|prompt| prompt.text),
                    content,
                ));
            }
        }
        if spans.len() != targets.len() {
            let reason = "the template marks no generated text in an assistant turn".to_owned();
            return Err(Refusal::Reason(reason));
        }
        Ok((whole.text, prefixes, spans))
    }

    fn skip(&mut self, source: (usize, usize), reason: String) {
        self.out.skipped.push(Skipped { source, reason });
    }

    fn push(&mut self, encoded: Encoded, source: (usize, usize), group: usize) {
        let Encoded {
            input_ids,
            labels,
            target_ends,
        } = encoded;
        self.out.units.push(Unit {
            input_ids,
            labels,
            target_ends,
            source,
            group,
        });
    }
}

/// Where the last turn of `text` is: after the generation prompt, up to and with the token that ends the turn.
fn target_span(text: &str, prompt: Option<String>, content: &str) -> Range<usize> {
    let start = match prompt.filter(|prompt| text.starts_with(prompt.as_str())) {
        Some(prompt) => prompt.len(),
        // No generation prompt in this template, or another one: the turn begins with its content.
        None => text
            .rfind(content)
            .or_else(|| text.rfind(content.trim()))
            .unwrap_or(0),
    };
    let end = text.trim_end().len().max(start);
    start..end
}
