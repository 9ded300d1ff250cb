//! A model's tokenizer and chat template, as Hugging Face stores them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer as Inner;

use super::calendar::Date;
use super::template::{CHATML, ChatTemplate};
use crate::error::{Error, Result};

/// Files that belong to a tokenizer; those there are get copied beside an adapter.
pub const FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// Tokens of a text, each with the bytes it came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Ids.
    pub ids: Vec<u32>,
    /// Byte range in the text, per token.
    pub offsets: Vec<Range<usize>>,
}

/// `tokenizer.json` with what `tokenizer_config.json` says about it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Inner,
    /// Id of the token that ends a text.
    pub eos_token_id: Option<u32>,
    special_tokens: Vec<(String, String)>,
    template_source: Option<String>,
    dir: PathBuf,
}

impl Tokenizer {
    /// Reads the tokenizer in `dir`.
    ///
    /// # Errors
    /// [`Error::Missing`] without `tokenizer.json`, [`Error::Format`] where a file is malformed.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            let what =
                "tokenizer (chat and text data need it; pre-tokenised data do not)".to_owned();
            let tried = vec![path];
            return Err(Error::Missing { what, tried });
        }
        let bytes = fs_err::read(&path)?;
        let mut inner = Inner::from_bytes(&bytes)
            .map_err(|error| Error::format(&path, format!("is not a tokenizer: {error}")))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| Error::format(&path, error.to_string()))?;
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let special_tokens = special_tokens(&config);
        let find = |name: &str| special_tokens.iter().find(|(key, _)| key == name);
        let eos_token_id = find("eos_token").and_then(|(_, token)| inner.token_to_id(token));
        let jinja = dir.join("chat_template.jinja");
        let template_source = if jinja.is_file() {
            Some(fs_err::read_to_string(jinja)?)
        } else {
            template_of(&config)
        };
        let dir = dir.to_owned();
        Ok(Self {
            inner,
            eos_token_id,
            special_tokens,
            template_source,
            dir,
        })
    }

    /// The chat template: `replacement` (a file, or `chatml`) if there is one, else the model's own.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is none, [`Error::Format`] if it cannot be compiled.
    pub fn chat_template(&self, replacement: Option<&Path>, today: Date) -> Result<ChatTemplate> {
        let (source, origin) = match replacement {
            Some(path) if path == Path::new("chatml") => (CHATML.to_owned(), path.to_owned()),
            Some(path) if path.is_file() => (fs_err::read_to_string(path)?, path.to_owned()),
            Some(path) => {
                let what = "`chat_template`".to_owned();
                return Err(Error::Missing {
                    what,
                    tried: vec![path.to_owned()],
                });
            }
            None => {
                if let Some(source) = &self.template_source {
                    (source.clone(), self.dir.join("tokenizer_config.json"))
                } else {
                    let what = "chat template of the model (a base model has none; set `chat_template` to a \
                            Jinja file, or to `chatml`)"
                    .to_owned();
                    let tried = ["tokenizer_config.json", "chat_template.jinja"];
                    let tried = tried.map(|name| self.dir.join(name)).to_vec();
                    return Err(Error::Missing { what, tried });
                }
            }
        };
        ChatTemplate::new(&source, &self.special_tokens, today)
            .map_err(|reason| Error::format(origin, format!("chat template: {reason}")))
    }

    /// Tokens of `text`; with `add_special_tokens`, those that the tokenizer puts around a whole text (BOS) too.
    ///
    /// # Errors
    /// [`Error::Format`] where the tokenizer fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Tokens> {
        let encoding = self
            .inner
            .encode(text, add_special_tokens)
            .map_err(|error| {
                Error::format(
                    self.dir.join("tokenizer.json"),
                    format!("cannot encode a text: {error}"),
                )
            })?;
        let offsets = encoding
            .get_offsets()
            .iter()
            .map(|(start, end)| *start..*end);
        Ok(Tokens {
            ids: encoding.get_ids().to_vec(),
            offsets: offsets.collect(),
        })
    }

    /// Text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// Text of one token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids a text may get, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

fn read_json(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&fs_err::read_to_string(path)?)
        .map_err(|error| Error::format(path, format!("no JSON: {error}")))
}

/// `*_token` entries: a text, or an object with `content`.
fn special_tokens(config: &Value) -> Vec<(String, String)> {
    let entries = config.as_object().into_iter().flatten();
    let tokens = entries.filter(|(key, _)| key.ends_with("_token"));
    tokens
        .filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), text.to_owned()))
        })
        .collect()
}

/// `chat_template`: a text, or a list of named ones of which `default` counts.
fn template_of(config: &Value) -> Option<String> {
    let template = config.get("chat_template")?;
    if let Some(text) = template.as_str() {
        return Some(text.to_owned());
    }
    let named = template.as_array()?;
    let default = named.iter().find(|entry| entry["name"] == "default");
    let text = default.or_else(|| named.first())?["template"].as_str();
    text.map(str::to_owned)
}
