//! Chat templates: Jinja, rendered as Hugging Face renders them, with the spans that `{% generation %}` marks.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error as JinjaError, ErrorKind};
use serde::Serialize;

use super::calendar::Date;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A template for models that come without one.
pub const CHATML: &str = "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + \
    '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Marks the begin and the end of generated text in a rendering; not characters, so no text holds them.
const BEGIN: char = '\u{FDD0}';
const END: char = '\u{FDD1}';
/// Steps a template may take.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat_template";

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges inside `{% generation %}` blocks, in order.
    pub generated: Vec<std::ops::Range<usize>>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    marks_generation: bool,
    merges_system: bool,
}

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are variables of the template (`bos_token`, ...); `today` is what
    /// `strftime_now` tells.
    ///
    /// # Errors
    /// What is wrong with the template.
    pub fn new(
        source: &str,
        special_tokens: &[(String, String)],
        today: Date,
    ) -> Result<Self, String> {
        let (rewritten, marks_generation) = mark_generation(source);
        let mut environment = environment(today).map_err(|error| describe(&error))?;
        for (name, token) in special_tokens {
            environment.add_global(name.clone(), token.as_str());
        }
        environment
            .add_template_owned(NAME, rewritten)
            .map_err(|error| describe(&error))?;
        let mut template = Self {
            environment,
            source: source.to_owned(),
            marks_generation,
            merges_system: false,
        };
        template.merges_system = template.refuses_system();
        Ok(template)
    }

    /// The source text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether generated text is marked in the template.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Whether the template refuses or drops a system turn, which is then merged into the first user turn.
    pub fn merges_system(&self) -> bool {
        self.merges_system
    }

    /// Renders `messages`; with `add_generation_prompt`, up to where the model would answer.
    ///
    /// # Errors
    /// What the template or the engine complains about.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        if self.merges_system {
            self.render_as_is(&merge_system(messages), add_generation_prompt)
        } else {
            self.render_as_is(messages, add_generation_prompt)
        }
    }

    fn render_as_is(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        let context = minijinja::context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            tools => (),
            documents => (),
        };
        let template = self.environment.get_template(NAME);
        let text = template.and_then(|template| template.render(context));
        Ok(split_marks(&text.map_err(|error| describe(&error))?))
    }

    /// Renders a system turn and looks whether it comes out.
    fn refuses_system(&self) -> bool {
        const PROBE: &str = "brightrun-system-probe";
        let user = Message::new("user", "a");
        let answer = Message::new("assistant", "b");
        let plain = [user.clone(), answer.clone()];
        let with_system = [Message::new("system", PROBE), user, answer];
        self.render_as_is(&plain, false).is_ok()
            && !self
                .render_as_is(&with_system, false)
                .is_ok_and(|rendered| rendered.text.contains(PROBE))
    }
}

/// The system turn in front of the first user turn's text.
fn merge_system(messages: &[Message]) -> Vec<Message> {
    let Some((system, rest)) = messages
        .split_first()
        .filter(|(first, _)| first.role == "system")
    else {
        return messages.to_vec();
    };
    let mut rest = rest.to_vec();
    if let Some(user) = rest.iter_mut().find(|message| message.role == "user") {
        user.content = format!("{}\n\n{}", system.content, user.content);
    }
    rest
}

fn environment(today: Date) -> Result<Environment<'static>, JinjaError> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build()?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<Value, _> {
        Err(JinjaError::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| today.format(&format));
    Ok(environment)
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature minijinja calls"
)]
fn to_json(value: Value, options: minijinja::value::Kwargs) -> Result<Value, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    let json = serde_json::to_value(&value)
        .map_err(|error| JinjaError::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut out = String::new();
    write_json(&mut out, &json, indent, 0);
    Ok(Value::from_safe_string(out))
}

fn write_json(out: &mut String, value: &serde_json::Value, indent: Option<usize>, depth: usize) {
    use serde_json::Value as Json;
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        Json::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push_str(comma);
                }
                line(out, depth + 1);
                write_json(out, item, indent, depth + 1);
            }
            line(out, depth);
            out.push(']');
        }
        Json::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (index, (key, item)) in fields.iter().enumerate() {
                if index > 0 {
                    out.push_str(comma);
                }
                line(out, depth + 1);
                out.push_str(&Json::String(key.clone()).to_string());
                out.push_str(": ");
                write_json(out, item, indent, depth + 1);
            }
            line(out, depth);
            out.push('}');
        }
        Json::Null
        | Json::Bool(_)
        | Json::Number(_)
        | Json::String(_)
        | Json::Array(_)
        | Json::Object(_) => out.push_str(&value.to_string()),
    }
}

/// What went wrong, innermost first: a template's own `raise_exception` is its text alone.
fn describe(error: &JinjaError) -> String {
    let detail = error.detail().map(str::to_owned);
    let text = detail.unwrap_or_else(|| error.kind().to_string());
    match error.line() {
        Some(line) => format!("{text} (line {line} of the template)"),
        None => text,
    }
}

/// `{% generation %}` and `{% endgeneration %}` rewritten so that the rendering holds [`BEGIN`] and [`END`]; whether
/// there were any. Whitespace control on either side of a tag keeps its effect.
fn mark_generation(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let (mut rest, mut found) = (source, false);
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}").map(|end| end + 2) else {
            break;
        };
        let tag = &rest[start..start + len];
        let inner = &tag[2..len - 2];
        let left = inner.chars().next().filter(|c| matches!(c, '-' | '+'));
        let right = inner.chars().last().filter(|c| matches!(c, '-' | '+'));
        let name = inner.trim_matches(['-', '+']).trim();
        let (left, right) = (text_of(left), text_of(right));
        out.push_str(&rest[..start]);
        match name {
            "generation" => {
                out.push_str(&format!(
                    "{{%{left} if true %}}{{{{ '{BEGIN}' }}}}{{% if true {right}%}}"
                ));
                found = true;
            }
            "endgeneration" => {
                out.push_str(&format!(
                    "{{%{left} endif %}}{{{{ '{END}' }}}}{{% endif {right}%}}"
                ));
            }
            _ => out.push_str(tag),
        }
        rest = &rest[start + len..];
    }
    out.push_str(rest);
    (out, found)
}

fn text_of(sign: Option<char>) -> String {
    sign.map(String::from).unwrap_or_default()
}

fn split_marks(marked: &str) -> Rendered {
    let mut rendered = Rendered::default();
    let mut begin = None;
    for character in marked.chars() {
        match character {
            BEGIN => begin = Some(rendered.text.len()),
            END => rendered
                .generated
                .extend(begin.take().map(|begin| begin..rendered.text.len())),
            other => rendered.text.push(other),
        }
    }
    rendered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let tokens = [("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::new(source, &tokens, Date::from_days(20_000)).unwrap()
    }

    fn render(source: &str) -> String {
        let messages = [Message::new("user", "<é>"), Message::new("assistant", "b")];
        template(source).render(&messages, false).unwrap().text
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_trims_them() {
        let source = "  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\nend\n";
        assert_eq!(render(source), "user\nassistant\nend");
    }

    #[test]
    fn python_methods_and_negative_slices_work() {
        assert_eq!(
            render("{{ ' x '.strip() }}{{ messages[::-1][0].role.upper() }}"),
            "xASSISTANT"
        );
        assert_eq!(
            render("{{ bos_token }}{{ messages[-1]['content'] }}"),
            "<s>b"
        );
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        assert_eq!(
            render("{{ messages[0] | tojson }}"),
            r#"{"role": "user", "content": "<é>"}"#
        );
        assert_eq!(
            render("{{ {'a': [1, 2], 'b': {}} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {}\n}"
        );
    }

    #[test]
    fn an_exception_of_the_template_is_its_message() {
        let template = template("{{ raise_exception('roles must alternate') }}");
        let message = template.render(&[], false).unwrap_err();
        assert!(message.starts_with("roles must alternate"), "{message}");
    }

    #[test]
    fn a_date_comes_from_the_run_and_not_from_the_clock() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}"), "04 Oct 2024");
    }

    #[test]
    fn a_refused_or_dropped_system_turn_is_merged() {
        let strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}\
            {% for m in messages %}[{{ m.content }}]{% endfor %}";
        let silent = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}";
        for source in [strict, silent] {
            let template = template(source);
            assert!(template.merges_system());
            let messages = [Message::new("system", "s"), Message::new("user", "u")];
            assert_eq!(template.render(&messages, false).unwrap().text, "[s\n\nu]");
        }
        assert!(!template(CHATML).merges_system());
    }

    #[test]
    fn an_endless_template_runs_out_of_fuel() {
        let source =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(template(source).render(&[], false).is_err());
    }
}
