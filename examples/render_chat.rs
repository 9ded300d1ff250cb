//! Renders and tokenises chats the way training does:
//! `cargo run --release --example render_chat -- TOKENIZER_DIR < chats.jsonl`.
//!
//! Each input line is `{"messages": [{"role", "content"}], "add_generation_prompt": bool}` or `{"text": "..."}`; each output
//! line is `{"text", "ids", "merges_system"}`, or `{"error"}` where the template refuses.

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, Result};
use brightrun::data::calendar::Date;
use brightrun::data::template::{ChatTemplate, Message};
use brightrun::data::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments
        .next()
        .context("usage: render_chat TOKENIZER_DIR < chats.jsonl")?;
    let tokenizer = Tokenizer::open(Path::new(&dir))?;
    let template = tokenizer.chat_template(None, Date::today())?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let input: Value = serde_json::from_str(&line?)?;
        let answer = render(&tokenizer, &template, &input)
            .unwrap_or_else(|error| json!({"error": error.to_string()}));
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn render(tokenizer: &Tokenizer, template: &ChatTemplate, input: &Value) -> Result<Value> {
    let text = if let Some(text) = input["text"].as_str() {
        text.to_owned()
    } else {
        let prompt = input["add_generation_prompt"].as_bool().unwrap_or(false);
        template
            .render(&messages(input)?, prompt)
            .map_err(anyhow::Error::msg)?
            .text
    };
    let ids = tokenizer.encode(&text, false)?.ids;
    let merges_system = template.merges_system();
    Ok(json!({"text": text, "ids": ids, "merges_system": merges_system}))
}

fn messages(input: &Value) -> Result<Vec<Message>> {
    let turns = input["messages"]
        .as_array()
        .context("`messages` is no list")?;
    let field = |turn: &Value, key: &str| {
        turn[key]
            .as_str()
            .map(str::to_owned)
            .context("a turn without text")
    };
    turns
        .iter()
        .map(|turn| Ok(Message::new(&field(turn, "role")?, field(turn, "content")?)))
        .collect()
}
