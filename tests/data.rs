//! Data: chat templates and labels against Hugging Face's, the application's formats, folding, truncation, the report.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use std::path::{Path, PathBuf};

use brightrun::config::TrainConfig;
use brightrun::data::calendar::Date;
use brightrun::data::template::{ChatTemplate, Message};
use brightrun::data::tokenizer::Tokenizer;
use brightrun::data::{Dataset, IGNORE_INDEX, Unit};
use common::golden;
use serde_json::Value;

const VOCAB: usize = 288;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn config(path: &Path, settings: &str) -> TrainConfig {
    let text = format!(
        "base_model: x\ndatasets: [{{path: {:?}}}]\n{settings}",
        path.display().to_string()
    );
    TrainConfig::from_yaml(&text, Path::new("test.yml"), &[]).unwrap()
}

fn load(path: &Path, settings: &str) -> brightrun::error::Result<Dataset> {
    let config = config(path, settings);
    Dataset::load(
        &config,
        &golden("tokenizer"),
        VOCAB,
        Date::from_days(20_000),
    )
}

/// A data set of the given lines.
fn lines(lines: &[&str], settings: &str) -> brightrun::error::Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    fs_err::write(&path, lines.join("\n")).unwrap();
    load(&path, settings)
}

fn learnt(unit: &Unit) -> String {
    let tokenizer = Tokenizer::open(&golden("tokenizer")).unwrap();
    let labels = unit.labels.iter().filter(|label| **label != IGNORE_INDEX);
    let ids: Vec<u32> = labels.map(|label| u32::try_from(*label).unwrap()).collect();
    tokenizer.decode(&ids)
}

fn text(unit: &Unit) -> String {
    Tokenizer::open(&golden("tokenizer"))
        .unwrap()
        .decode(&unit.input_ids)
}

#[test]
fn templates_tokens_and_labels_equal_hugging_faces() {
    let json: Value =
        serde_json::from_str(&fs_err::read_to_string(golden("chat_template_golden.json")).unwrap())
            .unwrap();
    let tokenizer = Tokenizer::open(&golden("tokenizer")).unwrap();
    for case in json["plain"].as_array().unwrap() {
        let expected: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        assert_eq!(
            tokenizer
                .encode(case["text"].as_str().unwrap(), false)
                .unwrap()
                .ids,
            expected,
            "{case}"
        );
    }
    for key in ["template", "template_generation"] {
        let source = json[key].as_str().unwrap();
        let template = ChatTemplate::new(source, &[], Date::from_days(0)).unwrap();
        assert_eq!(template.marks_generation(), key == "template_generation");
        for case in json["conversations"].as_array().unwrap() {
            let turns = case["messages"].as_array().unwrap();
            let turn = |turn: &Value| {
                Message::new(
                    turn["role"].as_str().unwrap(),
                    turn["content"].as_str().unwrap(),
                )
            };
            let messages: Vec<Message> = turns.iter().map(turn).collect();
            let rendered = template
                .render(&messages, case["add_generation_prompt"].as_bool().unwrap())
                .unwrap();
            assert_eq!(
                rendered.text,
                case["text"].as_str().unwrap(),
                "{key} {}",
                case["name"]
            );
            let expected: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
            assert_eq!(
                tokenizer.encode(&rendered.text, false).unwrap().ids,
                expected
            );
        }
    }
}

#[test]
fn labels_of_conversations_equal_hugging_faces() {
    let json: Value =
        serde_json::from_str(&fs_err::read_to_string(golden("chat_template_golden.json")).unwrap())
            .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let with_tags = dir.path().join("tags.jinja");
    fs_err::write(&with_tags, json["template_generation"].as_str().unwrap()).unwrap();
    let mut compared = 0;
    for settings in [
        String::new(),
        format!("chat_template: {:?}", with_tags.display().to_string()),
    ] {
        for case in json["conversations"].as_array().unwrap() {
            // An empty answer is nothing to learn here, and a prompt without an answer no training record.
            let turns = case["messages"].as_array().unwrap();
            if turns
                .iter()
                .any(|turn| turn["content"] == "" && turn["role"] == "assistant")
                || turns.last().unwrap()["role"] != "assistant"
            {
                continue;
            }
            let line = serde_json::json!({"messages": turns}).to_string();
            let dataset = lines(&[&line], &settings).unwrap();
            let expected: Vec<i32> = serde_json::from_value(case["labels"].clone()).unwrap();
            assert_eq!(dataset.train[0].labels, expected, "{}", case["name"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 8);
}

#[test]
fn the_applications_pairs_fold_into_one_sequence_per_conversation() {
    let dataset = load(&fixture("training.jsonl"), "").unwrap();
    let report = &dataset.report;
    assert_eq!(
        (report.num_headers, report.num_targets),
        (1, report.formats["pairs"])
    );
    assert_eq!(report.num_repeated_user_turns, report.num_targets);
    assert_eq!(dataset.train.len() + report.num_folded, report.num_targets);
    assert!(report.num_folded > 0);
    let whole = text(&dataset.train[0]);
    assert_eq!(
        whole.matches("My tomatoes died again").count(),
        1,
        "{whole}"
    );
    // Unfolded: one sequence per pair, which holds the same targets and more tokens.
    let single = load(&fixture("training.jsonl"), "fold_conversations: false").unwrap();
    assert_eq!(single.train.len(), report.num_targets);
    assert_eq!(single.report.num_target_tokens, report.num_target_tokens);
    assert!(single.report.num_tokens > report.num_tokens);
}

#[test]
fn the_full_document_gives_the_same_targets_as_its_lines() {
    let lines = load(&fixture("training.jsonl"), "").unwrap();
    let document = load(&fixture("training.json"), "").unwrap();
    assert_eq!(document.report.num_targets, lines.report.num_targets);
    let learnt_of = |dataset: &Dataset| dataset.train.iter().map(learnt).collect::<Vec<_>>();
    assert_eq!(learnt_of(&document), learnt_of(&lines));
    // User turns have a null target, and their line is known.
    let nulls: Vec<_> = document
        .report
        .skipped
        .iter()
        .filter(|s| s.reason == "`target_response` is null")
        .collect();
    assert!(!nulls.is_empty() && nulls.iter().all(|skipped| skipped.source.1 > 1));
}

#[test]
fn every_format_is_recognised() {
    let dataset = load(&fixture("edge_and_other_formats.jsonl"), "").unwrap();
    assert_eq!(
        dataset
            .report
            .formats
            .iter()
            .map(|(k, v)| (*k, *v))
            .collect::<Vec<_>>(),
        [("messages", 1), ("pairs", 1), ("turns", 1)]
    );
    assert_eq!(dataset.report.skipped[0].source, (0, 2));
    let others = lines(
        &[
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
            r#"{"instruction": "add", "input": "1 2", "output": "3"}"#,
            r#"{"prompt": "once ", "completion": "upon"}"#,
            r#"{"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "c"}]}"#,
            r#"{"text": "plain"}"#,
            r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}"#,
        ],
        "",
    )
    .unwrap();
    let learnt: Vec<String> = others.train.iter().map(learnt).collect();
    assert_eq!(learnt[0], "b<|im_end|>");
    assert_eq!(learnt[1], "3<|im_end|>");
    assert!(text(&others.train[1]).contains("add\n\n1 2"));
    assert_eq!(learnt[2], "upon<|im_end|>");
    assert_eq!(learnt[3], "c<|im_end|>");
    assert_eq!(learnt[4], "plain<|im_end|>");
    assert_eq!(others.train[5].target_ends, [2]);
}

#[test]
fn a_history_that_ends_with_another_user_turn_is_merged() {
    let pair = |history: &str| {
        format!(
            r#"{{"conversation_history": [{{"role": "user", "content": "{history}"}}], "current_user_input": "now", "target_response": "ok"}}"#
        )
    };
    let dataset = lines(&[&pair("before"), &pair(" now ")], "").unwrap();
    assert!(text(&dataset.train[0]).contains("before\n\nnow<|im_end|>"));
    assert_eq!(text(&dataset.train[1]).matches("now").count(), 1);
    assert_eq!(dataset.report.num_merged_user_turns, 1);
}

#[test]
fn truncation_drops_whole_turns_keeps_the_system_turn_and_never_loses_a_target() {
    let mut turns = vec![serde_json::json!({"role": "system", "content": "Sys."})];
    for index in 0..6 {
        turns.push(serde_json::json!({"role": "user", "content": format!("question {index} {}", "x".repeat(20))}));
        turns.push(serde_json::json!({"role": "assistant", "content": format!("answer {index}")}));
    }
    let line = serde_json::json!({"messages": turns}).to_string();
    let whole = lines(&[&line], "").unwrap();
    assert_eq!(whole.train.len(), 1);
    let cut = lines(&[&line], "sequence_len: 160").unwrap();
    assert!(cut.train.len() > 1 && !cut.report.truncated.is_empty());
    assert!(cut.train.iter().all(|unit| unit.input_ids.len() <= 160));
    let joined: String = cut.train.iter().map(learnt).collect();
    assert_eq!(
        joined,
        learnt(&whole.train[0]),
        "each target is learnt once"
    );
    for unit in &cut.train {
        let text = text(unit);
        assert!(
            text.starts_with("<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\n"),
            "{text}"
        );
    }
    // The last target keeps as much context as fits: one more turn would not have.
    let too_short = lines(&[&line], "sequence_len: 30").unwrap_err().to_string();
    assert!(
        too_short.contains("its target does not fit") && too_short.contains("`sequence_len` is 30"),
        "{too_short}"
    );
}

#[test]
fn a_target_that_is_too_long_alone_is_skipped_with_its_line() {
    let long = format!(
        r#"{{"messages": [{{"role": "user", "content": "u"}}, {{"role": "assistant", "content": "{}"}}]}}"#,
        "z".repeat(300)
    );
    let short = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "fine"}]}"#;
    let dataset = lines(&[short, &long], "sequence_len: 64").unwrap();
    assert_eq!(dataset.train.len(), 1);
    assert_eq!(dataset.report.skipped[0].source, (0, 2));
}

#[test]
fn long_texts_are_cut_into_pieces_and_long_rows_keep_their_labels() {
    let text = format!(r#"{{"text": "{}"}}"#, "a b ".repeat(100));
    let dataset = lines(&[&text], "sequence_len: 64").unwrap();
    assert!(dataset.train.len() > 2);
    let total: usize = dataset.train.iter().map(|unit| unit.input_ids.len()).sum();
    assert_eq!(total, lines(&[&text], "").unwrap().train[0].input_ids.len());
    let ids: Vec<usize> = (0..100).collect();
    let labels = |first: i32| {
        (0..100)
            .map(|id| if id >= first { id } else { -100 })
            .collect::<Vec<i32>>()
    };
    let row = |first| serde_json::json!({"input_ids": ids, "labels": labels(first)}).to_string();
    let dataset = lines(&[&row(90), &row(10)], "sequence_len: 64").unwrap();
    assert_eq!(dataset.train[0].input_ids[0], 36);
    assert_eq!(dataset.report.truncated, [(0, 1)]);
    assert_eq!(dataset.report.skipped[0].source, (0, 2));
}

#[test]
fn a_template_that_renders_prefixes_differently_is_not_folded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("think.jinja");
    // The last answer gets a think block, earlier ones lose it.
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs_err::write(&path, source).unwrap();
    let settings = format!("chat_template: {:?}", path.display().to_string());
    let dataset = load(&fixture("training.jsonl"), &settings).unwrap();
    assert_eq!(dataset.train.len(), dataset.report.num_targets);
    assert!(dataset.report.num_unfoldable > 0);
    assert!(
        dataset
            .train
            .iter()
            .all(|unit| learnt(unit).starts_with("<think>"))
    );
}

#[test]
fn a_template_without_a_system_role_gets_it_merged_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("strict.jinja");
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs_err::write(&path, source).unwrap();
    let settings = format!("chat_template: {:?}", path.display().to_string());
    let dataset = load(&fixture("training.jsonl"), &settings).unwrap();
    assert!(dataset.report.merges_system);
    assert!(text(&dataset.train[0]).starts_with("<|im_start|>user\nYou are a calm"));
    assert!(dataset.report.to_string().contains("has no system role"));
}

#[test]
fn everything_is_learnt_when_asked() {
    let line = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}"#;
    let dataset = lines(&[line], "train_on_inputs: true").unwrap();
    assert!(
        dataset.train[0]
            .labels
            .iter()
            .all(|label| *label != IGNORE_INDEX)
    );
}

#[test]
fn the_held_out_split_keeps_conversations_whole() {
    let dataset = load(
        &fixture("training.jsonl"),
        "fold_conversations: false\nval_set_size: 0.3",
    );
    // One conversation cannot be split.
    let message = dataset.map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("`val_set_size`"), "{message}");
    let rows: Vec<String> = (0..10)
        .map(|id| format!(r#"{{"input_ids": [{id}, 1, 2]}}"#))
        .collect();
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    let dataset = lines(&rows, "val_set_size: 0.3").unwrap();
    assert_eq!((dataset.train.len(), dataset.eval.len()), (7, 3));
    let again = lines(&rows, "val_set_size: 3").unwrap();
    assert_eq!(again.eval, dataset.eval);
    assert_eq!(again.digest(), dataset.digest());
    assert_ne!(
        lines(&rows, "val_set_size: 3\nseed: 1").unwrap().digest(),
        dataset.digest()
    );
}

#[test]
fn broken_text_is_mended_or_skipped_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let mut bytes = b"\xEF\xBB\xBF{\"text\": \"half \\ud83c end\"}\r\n{\"text\": \"".to_vec();
    bytes.extend(b"\xFF\"}\n{\"text\": \"good\"}\n{\"text\": ");
    fs_err::write(&path, bytes).unwrap();
    let dataset = load(&path, "").unwrap();
    assert_eq!(dataset.train.len(), 2);
    assert_eq!(dataset.report.num_lone_surrogates, 1);
    let skipped: Vec<_> = dataset
        .report
        .skipped
        .iter()
        .map(|s| (s.source.1, s.reason.as_str()))
        .collect();
    assert_eq!(skipped[0], (2, "not UTF-8 at byte 11 of the line"));
    assert!(
        skipped[1].0 == 4 && skipped[1].1.starts_with("no JSON: EOF"),
        "{skipped:?}"
    );
}

#[test]
fn the_report_shows_the_mask() {
    let line = r#"{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello!"}]}"#;
    let report = lines(&[line, "{}", "[1]"], "").unwrap().report.to_string();
    assert!(
        report.contains("assistant\n[[Hello!<|im_end|>]]\n"),
        "{report}"
    );
    assert!(
        report.contains("skipped 1: not a JSON object (line 3)"),
        "{report}"
    );
    assert!(report.contains("records        1 messages"), "{report}");
}
