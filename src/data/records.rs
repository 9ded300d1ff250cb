//! Records of many formats to conversations, texts and token rows.

use std::path::Path;

use serde_json::{Map, Value};

use super::json::{Item, items};
use super::template::Message;
use crate::config::{DatasetSource, DatasetType};
use crate::error::{Error, Result};

/// What is trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// A conversation; `targets` are the indices of the turns to learn.
    Chat {
        /// Pairs with the same name belong to one conversation.
        conversation: Option<String>,
        /// Turns.
        messages: Vec<Message>,
        /// Turns to learn, ascending.
        targets: Vec<usize>,
    },
    /// A prompt and what follows it.
    Completion {
        /// Given.
        prompt: String,
        /// To learn.
        completion: String,
    },
    /// A text, learnt as a whole.
    Text(String),
    /// Tokens.
    Tokens {
        /// Tokens.
        input_ids: Vec<u32>,
        /// Labels, unshifted; absent: all tokens are learnt.
        labels: Option<Vec<i32>>,
    },
}

/// A record that can be trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Data set file (index into the config's list) and 1-based line.
    pub source: (usize, usize),
    /// Format it was read as.
    pub format: DatasetType,
    /// Content.
    pub body: Body,
}

/// A record that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Data set file (index into the config's list) and 1-based line.
    pub source: (usize, usize),
    /// Why.
    pub reason: String,
}

/// The records of all files.
#[derive(Debug, Default)]
pub struct Records {
    /// Those that can be trained on.
    pub records: Vec<Record>,
    /// Those left out.
    pub skipped: Vec<Skipped>,
    /// `_meta` lines.
    pub num_headers: usize,
    /// Pairs whose history already ended with the current user turn, which was not repeated.
    pub num_repeated_user_turns: usize,
    /// Pairs whose history ended with another user turn, to which the current one was appended.
    pub num_merged_user_turns: usize,
    /// Halves of characters that were replaced by U+FFFD.
    pub num_lone_surrogates: usize,
}

impl Records {
    /// Reads all files.
    ///
    /// # Errors
    /// [`Error::Missing`] for an absent file; [`Error::Data`] where a record can be read in two ways.
    pub fn read(sources: &[DatasetSource]) -> Result<Self> {
        let mut records = Self::default();
        for (index, source) in sources.iter().enumerate() {
            if !source.path.is_file() {
                let what = "data set".to_owned();
                let tried = vec![source.path.clone()];
                return Err(Error::Missing { what, tried });
            }
            let bytes = fs_err::read(&source.path)?;
            records.read_file(index, source, &bytes)?;
        }
        Ok(records)
    }

    /// Reads one file.
    fn read_file(&mut self, index: usize, source: &DatasetSource, bytes: &[u8]) -> Result<()> {
        let items = items(bytes);
        self.num_lone_surrogates += items.repaired;
        for item in items.items {
            let place = (index, item.line);
            match self.record(&source.path, source.kind, item)? {
                Ok(Some((format, body))) => self.records.push(Record {
                    source: place,
                    format,
                    body,
                }),
                Ok(None) => self.num_headers += 1,
                Err(reason) => self.skipped.push(Skipped {
                    source: place,
                    reason,
                }),
            }
        }
        Ok(())
    }

    fn record(
        &mut self,
        path: &Path,
        kind: DatasetType,
        item: Item,
    ) -> Result<Result<Option<(DatasetType, Body)>, String>> {
        let value = match item.value {
            Ok(value) => value,
            Err(reason) => return Ok(Err(reason)),
        };
        let Value::Object(fields) = value else {
            return Ok(Err("not a JSON object".to_owned()));
        };
        if fields.contains_key("_meta") && fields.len() == 1 {
            return Ok(Ok(None));
        }
        let format = if kind == DatasetType::Auto {
            let formats = detect(&fields);
            match formats.as_slice() {
                [] => return Ok(Err(unknown(&fields))),
                [one] => *one,
                [first, second, ..] => {
                    let (first, second) = (first.name(), second.name());
                    let reason = format!(
                        "can be read as `{first}` and as `{second}`; say which with `type` in `datasets`"
                    );
                    return Err(Error::Data {
                        path: path.to_owned(),
                        line: Some(item.line),
                        reason,
                    });
                }
            }
        } else {
            kind
        };
        let body = match format {
            DatasetType::Pairs => self.pair(&fields, item.conversation),
            DatasetType::Turns => chat(&fields, "turns", ("role", "content")),
            DatasetType::Sharegpt => chat(&fields, "conversations", ("from", "value")),
            DatasetType::Auto | DatasetType::Messages => {
                chat(&fields, "messages", ("role", "content"))
            }
            DatasetType::Alpaca => alpaca(&fields),
            DatasetType::PromptCompletion => prompt_completion(&fields),
            DatasetType::Text => text(&fields, "text").map(Body::Text),
            DatasetType::Tokens => tokens(&fields),
        };
        Ok(body.map(|body| Some((format, body))))
    }

    /// The application's pair: the target is one answer, the history comes before it.
    fn pair(
        &mut self,
        fields: &Map<String, Value>,
        conversation: Option<usize>,
    ) -> Result<Body, String> {
        let target = text(fields, "target_response")?;
        let input = text(fields, "current_user_input")?;
        let mut messages = Vec::new();
        if let Some(system) = optional_text(fields, "system_prompt")? {
            messages.push(Message::new("system", system));
        }
        match fields.get("conversation_history") {
            None | Some(Value::Null) => {}
            Some(Value::Array(turns)) => {
                for turn in turns {
                    messages.push(message(turn, ("role", "content"))?);
                }
            }
            Some(_) => return Err("`conversation_history` is not a list".to_owned()),
        }
        match messages.last_mut().filter(|last| last.role == "user") {
            Some(last) if last.content.trim() == input.trim() => self.num_repeated_user_turns += 1,
            Some(last) => {
                last.content = format!("{}\n\n{input}", last.content);
                self.num_merged_user_turns += 1;
            }
            None => messages.push(Message::new("user", input)),
        }
        messages.push(Message::new("assistant", target));
        let id = fields.get("conversation_id").and_then(Value::as_str);
        let conversation = match conversation {
            // A document's `conversation_id` is the name of a template that many conversations share.
            Some(number) => Some(format!("conversation {number}")),
            None => id.map(str::to_owned),
        };
        let targets = vec![messages.len() - 1];
        Ok(Body::Chat {
            conversation,
            messages,
            targets,
        })
    }
}

/// Formats whose keys the record has.
fn detect(fields: &Map<String, Value>) -> Vec<DatasetType> {
    let has = |key: &str| fields.contains_key(key);
    let candidates = [
        (DatasetType::Pairs, has("current_user_input")),
        (DatasetType::Turns, has("turns")),
        (DatasetType::Messages, has("messages")),
        (DatasetType::Sharegpt, has("conversations")),
        (DatasetType::Alpaca, has("instruction") && has("output")),
        (
            DatasetType::PromptCompletion,
            has("prompt") && has("completion"),
        ),
        (DatasetType::Text, has("text")),
        (DatasetType::Tokens, has("input_ids")),
    ];
    let found = candidates.into_iter().filter(|(_, found)| *found);
    found.map(|(format, _)| format).collect()
}

fn unknown(fields: &Map<String, Value>) -> String {
    let keys: Vec<String> = fields
        .keys()
        .take(8)
        .map(|key| format!("`{key}`"))
        .collect();
    format!(
        "no known format: its keys are {}; expected `messages`, `conversation_id` + `turns`, \
         `current_user_input` + `target_response`, `conversations`, `instruction` + `output`, `prompt` + \
         `completion`, `text` or `input_ids`",
        if keys.is_empty() {
            "none".to_owned()
        } else {
            keys.join(", ")
        }
    )
}

/// A text that must be there and not be blank.
fn text(fields: &Map<String, Value>, key: &str) -> Result<String, String> {
    match fields.get(key) {
        None => Err(format!("`{key}` is missing")),
        Some(Value::Null) => Err(format!("`{key}` is null")),
        Some(Value::String(text)) if text.trim().is_empty() => Err(format!("`{key}` is empty")),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("`{key}` is not a text")),
    }
}

/// A text that may be absent, null or blank.
fn optional_text(fields: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.trim().is_empty())),
        Some(_) => Err(format!("`{key}` is not a text")),
    }
}

/// A turn, roles in Hugging Face's words.
fn message(turn: &Value, (role_key, content_key): (&str, &str)) -> Result<Message, String> {
    let Value::Object(fields) = turn else {
        return Err("a turn is not an object".to_owned());
    };
    let role = text(fields, role_key)?;
    let role = match role.as_str() {
        "human" => "user",
        "gpt" | "chatgpt" | "model" | "bot" => "assistant",
        "system" | "developer" => "system",
        "user" | "assistant" | "tool" => role.as_str(),
        other => {
            return Err(format!(
                "`{role_key}` is `{other}`, expected system, user, assistant or tool"
            ));
        }
    };
    if fields
        .get("tool_calls")
        .is_some_and(|calls| !calls.is_null())
    {
        return Err("`tool_calls` are not supported".to_owned());
    }
    let content = match fields.get(content_key) {
        Some(Value::String(content)) => content.clone(),
        Some(Value::Array(parts)) => parts
            .iter()
            .map(
                |part| match (part.get("type").and_then(Value::as_str), part) {
                    (Some("text"), part) => part["text"].as_str().map(str::to_owned),
                    _ => None,
                },
            )
            .collect::<Option<String>>()
            .ok_or_else(|| format!("`{content_key}` has a part that is not text"))?,
        Some(Value::Null) | None => return Err(format!("`{content_key}` of a turn is missing")),
        Some(_) => return Err(format!("`{content_key}` of a turn is not a text")),
    };
    Ok(Message::new(role, content))
}

fn chat(fields: &Map<String, Value>, key: &str, keys: (&str, &str)) -> Result<Body, String> {
    let turns = match fields.get(key) {
        Some(Value::Array(turns)) if !turns.is_empty() => turns,
        Some(Value::Array(_)) => return Err(format!("`{key}` is empty")),
        Some(_) => return Err(format!("`{key}` is not a list")),
        None => return Err(format!("`{key}` is missing")),
    };
    let mut messages = Vec::new();
    if let Some(system) = optional_text(fields, "system")? {
        messages.push(Message::new("system", system));
    }
    let mut targets = Vec::new();
    for turn in turns {
        let message = message(turn, keys)?;
        let is_weighted = turn.get("weight").and_then(Value::as_f64) != Some(0.0);
        if message.role == "assistant" && is_weighted && !message.content.trim().is_empty() {
            targets.push(messages.len());
        }
        messages.push(message);
    }
    conversation(messages, targets)
}

fn conversation(mut messages: Vec<Message>, targets: Vec<usize>) -> Result<Body, String> {
    let Some(last) = targets.last() else {
        return Err("no assistant turn to learn".to_owned());
    };
    messages.truncate(last + 1);
    Ok(Body::Chat {
        conversation: None,
        messages,
        targets,
    })
}

fn alpaca(fields: &Map<String, Value>) -> Result<Body, String> {
    let mut user = text(fields, "instruction")?;
    if let Some(input) = optional_text(fields, "input")? {
        user = format!("{user}\n\n{input}");
    }
    let mut messages = Vec::new();
    if let Some(system) = optional_text(fields, "system")? {
        messages.push(Message::new("system", system));
    }
    messages.push(Message::new("user", user));
    messages.push(Message::new("assistant", text(fields, "output")?));
    let targets = vec![messages.len() - 1];
    conversation(messages, targets)
}

fn prompt_completion(fields: &Map<String, Value>) -> Result<Body, String> {
    let (prompt, completion) = (fields.get("prompt"), fields.get("completion"));
    if let (Some(Value::Array(prompt)), Some(Value::Array(completion))) = (prompt, completion) {
        let turns = prompt.iter().chain(completion);
        let messages: Result<Vec<Message>, String> = turns
            .map(|turn| message(turn, ("role", "content")))
            .collect();
        let messages = messages?;
        let answers = prompt.len()..messages.len();
        let targets = answers.filter(|index| messages[*index].role == "assistant");
        let targets = targets.collect();
        return conversation(messages, targets);
    }
    let prompt = match prompt {
        Some(Value::String(prompt)) => prompt.clone(),
        _ => return Err("`prompt` is not a text".to_owned()),
    };
    let completion = text(fields, "completion")?;
    Ok(Body::Completion { prompt, completion })
}

fn tokens(fields: &Map<String, Value>) -> Result<Body, String> {
    let row = |key: &str| -> Result<Option<Vec<i64>>, String> {
        match fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(row)) => {
                let row: Option<Vec<i64>> = row.iter().map(Value::as_i64).collect();
                row.map(Some)
                    .ok_or_else(|| format!("`{key}` is not a list of whole numbers"))
            }
            Some(_) => Err(format!("`{key}` is not a list of whole numbers")),
        }
    };
    let ids = row("input_ids")?.ok_or("`input_ids` is missing")?;
    if ids.is_empty() {
        return Err("`input_ids` is empty".to_owned());
    }
    let input_ids: Vec<u32> = ids
        .iter()
        .map(|id| {
            u32::try_from(*id).map_err(|_| format!("`input_ids` has {id}, expected ids from 0"))
        })
        .collect::<Result<_, _>>()?;
    let labels = row("labels")?;
    if let Some(labels) = &labels {
        if labels.len() != ids.len() {
            return Err(format!(
                "`labels` has {} entries and `input_ids` {}; they must be as long",
                labels.len(),
                ids.len()
            ));
        }
        let mut both = labels.iter().zip(&ids);
        if let Some((label, id)) = both.find(|(label, id)| **label != -100 && label != id) {
            return Err(format!(
                "`labels` has {label} where `input_ids` has {id}; a label is the token itself (not \
                 shifted) or -100"
            ));
        }
    }
    let labels = labels.map(|labels| {
        let narrow = labels
            .iter()
            .map(|label| i32::try_from(*label).unwrap_or(-100));
        narrow.collect()
    });
    Ok(Body::Tokens { input_ids, labels })
}
