//! Rows over REST, as `PostgREST` serves them, for the tables the worker touches.

mod filter;
mod schema;
mod timestamp;
mod types;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::http::header;
use axum::response::Response;
use serde_json::{Map, Value, json};

use self::filter::Query;
use self::schema::{Rejection, Table};
use super::server::{Call, empty_reply, json_reply, percent_decoded, set};

type Row = Map<String, Value>;

/// One change of a row, as the database's webhook reports it.
#[derive(Debug, Clone)]
pub struct RowEvent {
    /// Time since the simulator's start.
    pub at: Duration,
    /// Table of the row.
    pub table: String,
    /// The row before; null for an insert.
    pub old: Value,
    /// The row after.
    pub new: Value,
}

/// All tables.
#[derive(Debug)]
pub(super) struct Rows {
    origin: Instant,
    tables: BTreeMap<&'static str, Vec<Row>>,
    pub(super) events: Vec<RowEvent>,
}

impl Rows {
    pub(super) fn new(origin: Instant) -> Self {
        Self {
            origin,
            tables: BTreeMap::new(),
            events: Vec::new(),
        }
    }

    /// The rows of a table, in order of insertion.
    pub(super) fn all(&self, table: &str) -> Vec<Value> {
        self.tables
            .get(table)
            .into_iter()
            .flatten()
            .cloned()
            .map(Value::Object)
            .collect()
    }

    /// Inserts a row without any request, a user id filled in.
    pub(super) fn seed(&mut self, table: &str, row: &Value) -> Result<Value, String> {
        let mut fields = row.as_object().cloned().ok_or("a row must be an object")?;
        fields
            .entry("user_id")
            .or_insert_with(|| json!("00000000-0000-4000-a000-000000000001"));
        let insert = || {
            let table = schema::table(table)?;
            if table.column("user_id").is_err() {
                fields.shift_remove("user_id");
            }
            Ok(self.insert(table, vec![fields], false)?.swap_remove(0))
        };
        let inserted: Result<Row, Rejection> = { insert }();
        inserted
            .map(Value::Object)
            .map_err(|rejection| rejection.body["message"].to_string())
    }

    /// Updates rows without any request, as the application would: `query` is a filter such as `id=eq.x`.
    pub(super) fn edit(
        &mut self,
        table: &str,
        query: &str,
        fields: &Value,
    ) -> Result<usize, String> {
        let text = |rejection: Rejection| rejection.body["message"].to_string();
        let table = schema::table(table).map_err(text)?;
        let query = Query::read(query, table).map_err(text)?;
        let fields = fields.as_object().ok_or("the fields must be an object")?;
        let fields = table.accept(fields).map_err(text)?;
        Ok(self.update(table, &query, &fields).len())
    }

    fn select(&self, table: &Table, query: &Query) -> Vec<Row> {
        let rows = self.tables.get(table.name).into_iter().flatten();
        rows.filter(|row| query.matches(row)).cloned().collect()
    }

    fn update(&mut self, table: &'static Table, query: &Query, fields: &Row) -> Vec<Row> {
        let at = self.origin.elapsed();
        let mut updated = Vec::new();
        for row in self.tables.entry(table.name).or_default() {
            if !query.matches(row) {
                continue;
            }
            let old = Value::Object(row.clone());
            for (name, value) in fields {
                row.insert(name.clone(), value.clone());
            }
            let new = Value::Object(row.clone());
            self.events.push(RowEvent {
                at,
                table: table.name.to_owned(),
                old,
                new,
            });
            updated.push(row.clone());
        }
        updated
    }

    fn insert(
        &mut self,
        table: &'static Table,
        rows: Vec<Row>,
        merge: bool,
    ) -> Result<Vec<Row>, Rejection> {
        let mut accepted = Vec::new();
        for row in rows {
            accepted.push(table.accept(&row)?);
        }
        let mut inserted = Vec::new();
        for row in accepted {
            let known = self.tables.entry(table.name).or_default();
            let twin = row
                .get("id")
                .and_then(|id| known.iter().position(|known| known["id"] == *id));
            match twin {
                Some(at) if merge => {
                    known[at].extend(row);
                    inserted.push(known[at].clone());
                }
                Some(_) => {
                    let message = format!(
                        "duplicate key value violates unique constraint \"{}_pkey\"",
                        table.name
                    );
                    let details = format!(
                        "Key (id)=({}) already exists.",
                        row["id"].as_str().unwrap_or_default()
                    );
                    return Err(Rejection::new(409, "23505", &message).details(&details));
                }
                None => {
                    let row = table.complete(row)?;
                    known.push(row.clone());
                    inserted.push(row);
                }
            }
        }
        Ok(inserted)
    }
}

/// Answers a request below `/rest/v1/`.
pub(super) fn answer(call: &Call) -> Response {
    if let Some(refusal) = check_keys(call) {
        return refusal;
    }
    carry_out(call).unwrap_or_else(|rejection| json_reply(rejection.status, &rejection.body))
}

/// Refuses a request without the two headers, or with a wrong key in them.
fn check_keys(call: &Call) -> Option<Response> {
    let key = &call.shared.settings.service_key;
    let Some(apikey) = call.header("apikey") else {
        return Some(json_reply(
            401,
            &json!({
                "message": "No API key found in request",
                "hint": "No `apikey` request header or url param was found.",
            }),
        ));
    };
    if apikey != key {
        return Some(json_reply(
            401,
            &json!({
                "message": "Invalid API key",
                "hint": "Double check your Supabase `anon` or `service_role` API key.",
            }),
        ));
    }
    let bearer = call
        .header("authorization")
        .and_then(|sent| sent.strip_prefix("Bearer "));
    if bearer != Some(key) {
        let rejection = Rejection::new(401, "PGRST301", "JWSError JWSInvalidSignature");
        return Some(json_reply(rejection.status, &rejection.body));
    }
    None
}

fn carry_out(call: &Call) -> Result<Response, Rejection> {
    let name = percent_decoded(call.path.trim_start_matches("/rest/v1/"));
    let table = schema::table(&name)?;
    let query = Query::read(&call.query, table)?;
    match call.method.as_str() {
        "GET" | "HEAD" => {
            let rows = call.shared.lock().rows.select(table, &query);
            shaped(call, &query, rows, 200)
        }
        "PATCH" => patch(call, table, &query),
        "POST" => post(call, table, &query),
        _ => Err(Rejection::new(405, "PGRST117", "Unsupported HTTP method")),
    }
}

fn patch(call: &Call, table: &'static Table, query: &Query) -> Result<Response, Rejection> {
    let Value::Object(fields) = body(call)? else {
        return Err(Rejection::new(
            400,
            "PGRST102",
            "All object keys must match",
        ));
    };
    let fields = table.accept(&fields)?;
    if !query.is_filtered() {
        return Err(Rejection::new(
            400,
            "21000",
            "UPDATE requires a WHERE clause",
        ));
    }
    if wants_object(call) {
        // A request for one object that does not match one row changes nothing.
        let matched = call.shared.lock().rows.select(table, query).len();
        if matched != 1 {
            return Err(not_single(matched));
        }
    }
    let rows = call
        .shared
        .change(|state| state.rows.update(table, query, &fields));
    if wants_rows(call) {
        shaped(call, query, rows, 200)
    } else {
        Ok(empty_reply(204))
    }
}

fn post(call: &Call, table: &'static Table, query: &Query) -> Result<Response, Rejection> {
    let rows = match body(call)? {
        Value::Object(row) => vec![row],
        Value::Array(rows) => {
            let objects: Option<Vec<Row>> = rows
                .into_iter()
                .map(|row| row.as_object().cloned())
                .collect();
            objects.ok_or_else(empty_body)?
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            return Err(empty_body());
        }
    };
    let same_keys =
        |row: &Row| row.len() == rows[0].len() && row.keys().all(|key| rows[0].contains_key(key));
    if !rows.iter().all(same_keys) {
        return Err(Rejection::new(
            400,
            "PGRST102",
            "All object keys must match",
        ));
    }
    let merge = call
        .header("prefer")
        .is_some_and(|prefer| prefer.contains("resolution=merge-duplicates"));
    let rows = call.shared.change(|state| {
        // An insert of many rows is one transaction: all or none.
        let before = state
            .rows
            .tables
            .get(table.name)
            .cloned()
            .unwrap_or_default();
        let inserted = state.rows.insert(table, rows, merge);
        if inserted.is_err() {
            state.rows.tables.insert(table.name, before);
        }
        inserted
    })?;
    if wants_rows(call) {
        shaped(call, query, rows, 201)
    } else {
        Ok(empty_reply(201))
    }
}

fn body(call: &Call) -> Result<Value, Rejection> {
    serde_json::from_slice(&call.body).map_err(|_| empty_body())
}

fn empty_body() -> Rejection {
    Rejection::new(400, "PGRST102", "Empty or invalid json")
}

fn wants_rows(call: &Call) -> bool {
    call.header("prefer")
        .is_some_and(|prefer| prefer.contains("return=representation"))
}

fn wants_object(call: &Call) -> bool {
    call.header("accept")
        .is_some_and(|accept| accept.contains("application/vnd.pgrst.object+json"))
}

fn not_single(rows: usize) -> Rejection {
    Rejection::new(
        406,
        "PGRST116",
        "Cannot coerce the result to a single JSON object",
    )
    .details(&format!("The result contains {rows} rows"))
}

/// The rows as a list, or as one object if asked so.
fn shaped(call: &Call, query: &Query, rows: Vec<Row>, status: u16) -> Result<Response, Rejection> {
    let mut rows = query.shape(rows);
    if !wants_object(call) {
        return Ok(json_reply(status, &Value::Array(rows)));
    }
    if rows.len() != 1 {
        return Err(not_single(rows.len()));
    }
    let mut response = json_reply(status, &rows.swap_remove(0));
    set(
        &mut response,
        header::CONTENT_TYPE,
        "application/vnd.pgrst.object+json; charset=utf-8",
    );
    Ok(response)
}
