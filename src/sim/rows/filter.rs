//! Query parameters: `select`, `order`, `limit`, `offset`, and filters on columns.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use super::schema::{Column, Rejection, Table};

/// Which rows, and what of them.
#[derive(Debug, Default)]
pub(super) struct Query {
    tests: Vec<Test>,
    /// Columns to return; all if empty.
    columns: Vec<String>,
    order: Option<(String, bool)>,
    limit: Option<usize>,
    offset: usize,
}

#[derive(Debug)]
struct Test {
    column: String,
    negated: bool,
    operator: Operator,
}

#[derive(Debug)]
enum Operator {
    Compare(fn(Ordering) -> bool, Value),
    In(Vec<Value>),
    IsNull,
}

impl Query {
    /// Reads a query string.
    pub(super) fn read(query: &str, table: &Table) -> Result<Self, Rejection> {
        let mut read = Self::default();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let number = || value.parse().map_err(|_| parse_rejection(&value));
            match &*name {
                "select" if value != "*" => {
                    for column in value.split(',').map(str::trim) {
                        read.columns.push(table.column(column)?.name.to_owned());
                    }
                }
                "select" | "columns" | "on_conflict" => {}
                "order" => {
                    let (column, direction) = value.split_once('.').unwrap_or((&value, "asc"));
                    let column = table.column(column)?.name.to_owned();
                    read.order = Some((column, direction.starts_with("desc")));
                }
                "limit" => read.limit = Some(number()?),
                "offset" => read.offset = number()?,
                column => read.tests.push(Test::read(table.column(column)?, &value)?),
            }
        }
        Ok(read)
    }

    /// Whether any filter is there.
    pub(super) fn is_filtered(&self) -> bool {
        !self.tests.is_empty()
    }

    /// Whether a row passes every filter.
    pub(super) fn matches(&self, row: &Map<String, Value>) -> bool {
        self.tests.iter().all(|test| test.holds(row))
    }

    /// The rows as they are returned: ordered, cut, and with the selected columns.
    pub(super) fn shape(&self, mut rows: Vec<Map<String, Value>>) -> Vec<Value> {
        if let Some((column, descending)) = &self.order {
            rows.sort_by(|a, b| {
                let order = compare(&a[column], &b[column]);
                if *descending { order.reverse() } else { order }
            });
        }
        let rows = rows
            .into_iter()
            .skip(self.offset)
            .take(self.limit.unwrap_or(usize::MAX));
        rows.map(|mut row| {
            if !self.columns.is_empty() {
                row.retain(|name, _| self.columns.contains(name));
            }
            Value::Object(row)
        })
        .collect()
    }
}

impl Test {
    fn read(column: &Column, text: &str) -> Result<Self, Rejection> {
        let (negated, rest) = text
            .strip_prefix("not.")
            .map_or((false, text), |rest| (true, rest));
        let (name, operand) = rest.split_once('.').ok_or_else(|| parse_rejection(text))?;
        let value = |operand: &str| column.kind.read_operand(operand);
        let ordering = |test: fn(Ordering) -> bool| Ok(Operator::Compare(test, value(operand)?));
        let operator = match name {
            "eq" => ordering(Ordering::is_eq)?,
            "neq" => ordering(Ordering::is_ne)?,
            "lt" => ordering(Ordering::is_lt)?,
            "lte" => ordering(Ordering::is_le)?,
            "gt" => ordering(Ordering::is_gt)?,
            "gte" => ordering(Ordering::is_ge)?,
            "in" => {
                let items = list(operand).ok_or_else(|| parse_rejection(text))?;
                let items: Result<Vec<Value>, Rejection> =
                    items.iter().map(|item| value(item)).collect();
                Operator::In(items?)
            }
            "is" => match operand {
                "null" => Operator::IsNull,
                "true" | "false" => return Err(no_boolean(column, operand)),
                _ => return Err(parse_rejection(text)),
            },
            _ => return Err(parse_rejection(text)),
        };
        Ok(Self {
            column: column.name.to_owned(),
            negated,
            operator,
        })
    }

    /// As in SQL, a comparison with null is never true, negated or not.
    fn holds(&self, row: &Map<String, Value>) -> bool {
        let value = row.get(&self.column).unwrap_or(&Value::Null);
        match &self.operator {
            Operator::IsNull => value.is_null() != self.negated,
            Operator::Compare(..) | Operator::In(_) if value.is_null() => false,
            Operator::Compare(test, operand) => test(compare(value, operand)) != self.negated,
            Operator::In(list) => {
                list.iter().any(|item| compare(value, item).is_eq()) != self.negated
            }
        }
    }
}

fn text_of(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// Numbers by size, everything else by text.
fn compare(value: &Value, operand: &Value) -> Ordering {
    match (value.as_f64(), operand.as_f64()) {
        (Some(number), Some(operand)) => number.total_cmp(&operand),
        _ => text_of(value).cmp(&text_of(operand)),
    }
}

/// `(a,"b,c",d)`.
fn list(operand: &str) -> Option<Vec<String>> {
    let inside = operand.strip_prefix('(')?.strip_suffix(')')?;
    let (mut items, mut item, mut quoted) = (Vec::new(), String::new(), false);
    for c in inside.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => items.push(std::mem::take(&mut item)),
            c => item.push(c),
        }
    }
    items.push(item);
    Some(items)
}

/// No column here is a boolean.
fn no_boolean(column: &Column, operand: &str) -> Rejection {
    let (word, kind) = (operand.to_uppercase(), column.kind.name());
    let message = format!("argument of IS {word} must be type boolean, not type {kind}");
    Rejection::new(400, "42804", &message)
}

fn parse_rejection(text: &str) -> Rejection {
    Rejection::new(
        400,
        "PGRST100",
        &format!("\"failed to parse filter ({text})\" (line 1, column 1)"),
    )
}
