//! Data files as JSON values with their line numbers: JSON Lines, one array, or the application's full document.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

/// A value of the file.
#[derive(Debug)]
pub(super) struct Item {
    /// 1-based line it begins in.
    pub(super) line: usize,
    /// The conversation it belongs to in a full document, by number.
    pub(super) conversation: Option<usize>,
    /// The value, or why there is none.
    pub(super) value: Result<Value, String>,
}

/// The items of a file; `repaired` counts lone surrogates that were replaced by U+FFFD.
#[derive(Debug, Default)]
pub(super) struct Items {
    pub(super) items: Vec<Item>,
    pub(super) repaired: usize,
}

/// The application's full JSON.
#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow)]
    conversations: Vec<DocumentConversation<'a>>,
}

#[derive(Deserialize)]
struct DocumentConversation<'a> {
    #[serde(borrow)]
    training_pairs: Vec<&'a RawValue>,
}

/// Reads the bytes of a data file.
pub(super) fn items(bytes: &[u8]) -> Items {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    match std::str::from_utf8(bytes).ok().and_then(document) {
        Some(items) => items,
        None => lines(bytes),
    }
}

/// The file as one JSON value: a full document or an array. `None` if it is neither.
fn document(text: &str) -> Option<Items> {
    let start = text.trim_start();
    if start.starts_with('{') {
        // A line that is whole by itself is JSON Lines, unless it is a document on one line.
        let first = start.lines().next()?;
        let is_whole = serde_json::from_str::<serde::de::IgnoredAny>(first).is_ok();
        if is_whole && !first.contains("\"training_pairs\"") {
            return None;
        }
    } else if !start.starts_with('[') {
        return None;
    }
    let (text, repaired) = repair_surrogates(text);
    let pairs: Vec<(Option<usize>, &RawValue)> = if start.starts_with('[') {
        let rows: Vec<&RawValue> = serde_json::from_str(&text).ok()?;
        rows.into_iter().map(|row| (None, row)).collect()
    } else {
        let document: Document<'_> = serde_json::from_str(&text).ok()?;
        let numbered = document.conversations.into_iter().enumerate();
        numbered
            .flat_map(|(number, conversation)| {
                let pairs = conversation.training_pairs.into_iter();
                pairs.map(move |pair| (Some(number), pair))
            })
            .collect()
    };
    let mut items = Vec::with_capacity(pairs.len());
    let (mut line, mut position) = (1, 0);
    for (conversation, raw) in pairs {
        let offset = raw.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text[position..offset].matches('\n').count();
        position = offset;
        let value = serde_json::from_str(raw.get()).map_err(|error| format!("no JSON: {error}"));
        items.push(Item {
            line,
            conversation,
            value,
        });
    }
    Some(Items { items, repaired })
}

/// JSON Lines: split at `\n` alone, `\r` before it dropped, blank lines passed over.
fn lines(bytes: &[u8]) -> Items {
    let mut all = Items::default();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let value = match std::str::from_utf8(line) {
            Err(error) => Err(format!(
                "not UTF-8 at byte {} of the line",
                error.valid_up_to() + 1
            )),
            Ok(text) => {
                let (text, repaired) = repair_surrogates(text);
                all.repaired += repaired;
                serde_json::from_str(&text).map_err(|error| {
                    let text = error.to_string();
                    // The line number within the line says nothing.
                    format!(
                        "no JSON: {}",
                        text.replace(" at line 1 column ", " at column ")
                    )
                })
            }
        };
        all.items.push(Item {
            line: index + 1,
            conversation: None,
            value,
        });
    }
    all
}

/// Replaces escapes of lone surrogates (`\ud83c` without its other half) by `\ufffd`: JSON writers emit them where they
/// cut a text inside a character. Lengths stay as they are.
fn repair_surrogates(text: &str) -> (Cow<'_, str>, usize) {
    if !text.contains("\\ud") && !text.contains("\\uD") {
        return (Cow::Borrowed(text), 0);
    }
    let escape = |bytes: &[u8], at: usize| -> Option<u32> {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (high, low) = (0xD800..0xDC00, 0xDC00..0xE000);
    let mut out = text.to_owned();
    let bytes = text.as_bytes();
    let (mut at, mut repaired) = (0, 0);
    while at < bytes.len() {
        if bytes[at] != b'\\' {
            at += 1;
            continue;
        }
        match escape(bytes, at) {
            None => at += 2,
            Some(first) if high.contains(&first) => {
                if escape(bytes, at + 6).is_some_and(|second| low.contains(&second)) {
                    at += 12;
                } else {
                    out.replace_range(at..at + 6, "\\ufffd");
                    repaired += 1;
                    at += 6;
                }
            }
            Some(first) => {
                if low.contains(&first) {
                    out.replace_range(at..at + 6, "\\ufffd");
                    repaired += 1;
                }
                at += 6;
            }
        }
    }
    (Cow::Owned(out), repaired)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lone_surrogates_are_replaced_and_pairs_kept() {
        let text = r#""a\ud83c b\ud83c\udf31 \\ud83c \udc00""#;
        let (repaired, count) = repair_surrogates(text);
        assert_eq!(repaired, r#""a\ufffd b\ud83c\udf31 \\ud83c \ufffd""#);
        assert_eq!(count, 2);
        assert!(serde_json::from_str::<String>(&repaired).is_ok());
    }

    #[test]
    fn lines_survive_bom_carriage_returns_and_separators() {
        let bytes = "\u{FEFF}{\"text\":\"a\u{2028}b\"}\r\n\r\n{\"text\":1}\n{".as_bytes();
        let items = items(bytes).items;
        assert_eq!(
            items.iter().map(|item| item.line).collect::<Vec<_>>(),
            [1, 3, 4]
        );
        assert_eq!(items[0].value.as_ref().unwrap()["text"], "a\u{2028}b");
        assert!(items[2].value.is_err());
    }

    #[test]
    fn pairs_of_a_document_know_their_line_and_conversation() {
        let text = "{\n \"conversations\": [\n {\"training_pairs\": [\n{\"a\": 1},\n{\"a\": 2}]},\n\
                    {\"training_pairs\": [{\"a\": 3}]}]}";
        let items = items(text.as_bytes()).items;
        let found: Vec<_> = items
            .iter()
            .map(|item| (item.line, item.conversation))
            .collect();
        assert_eq!(found, [(4, Some(0)), (5, Some(0)), (6, Some(1))]);
    }
}
