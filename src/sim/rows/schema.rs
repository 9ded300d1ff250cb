//! Tables, and what `PostgreSQL` says to a row that does not fit.

use serde_json::{Map, Value, json};

use super::types::Kind;
use crate::sim::clock;

/// A column.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Refuses null, unless the table fills in a default.
    pub(super) required: bool,
}

/// A table; its primary key is `id`.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) columns: &'static [Column],
}

/// An error as `PostgREST` reports it.
#[derive(Debug)]
pub(super) struct Rejection {
    pub(super) status: u16,
    pub(super) body: Value,
}

impl Rejection {
    pub(super) fn new(status: u16, code: &str, message: &str) -> Self {
        Self {
            status,
            body: json!({"code": code, "details": null, "hint": null, "message": message}),
        }
    }

    pub(super) fn details(mut self, details: &str) -> Self {
        self.body["details"] = json!(details);
        self
    }
}

const fn column(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        required: false,
    }
}

const fn required(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        required: true,
    }
}

const JOB_STATUS: &[&str] = &[
    "pending",
    "queued",
    "initializing",
    "running",
    "completed",
    "failed",
    "cancelled",
];

static TABLES: &[Table] = &[
    Table {
        name: "pipeline_training_jobs",
        columns: &[
            required("id", Kind::Uuid),
            required("user_id", Kind::Uuid),
            column("name", Kind::Text),
            column("workbase_id", Kind::Uuid),
            column("dataset_id", Kind::Uuid),
            column("dataset_file_path", Kind::Text),
            column("dataset_name", Kind::Text),
            column("hyperparameters", Kind::Json),
            column("gpu_type", Kind::Text),
            column("gpu_count", Kind::Integer),
            required("status", Kind::Choice(JOB_STATUS)),
            column("progress", Kind::Integer),
            column("current_epoch", Kind::Integer),
            column("current_step", Kind::Integer),
            column("total_steps", Kind::Integer),
            column("current_loss", Kind::Float),
            column("current_learning_rate", Kind::Float),
            column("tokens_per_second", Kind::Float),
            column("final_loss", Kind::Float),
            column("training_time_seconds", Kind::Integer),
            column("adapter_file_path", Kind::Text),
            column("adapter_download_url", Kind::Text),
            column("adapter_status", Kind::Text),
            column("hf_adapter_path", Kind::Text),
            column("deployment_log", Kind::Json),
            column("actual_cost", Kind::Numeric(10, 2)),
            column("estimated_cost", Kind::Numeric(10, 2)),
            column("error_message", Kind::Text),
            column("error_details", Kind::Json),
            column("runpod_job_id", Kind::Text),
            column("runpod_endpoint_id", Kind::Text),
            column("started_at", Kind::Timestamp),
            column("completed_at", Kind::Timestamp),
            required("created_at", Kind::Timestamp),
            required("updated_at", Kind::Timestamp),
        ],
    },
    Table {
        name: "pipeline_training_metrics",
        columns: &[
            required("id", Kind::Uuid),
            required("job_id", Kind::Uuid),
            required("metric_id", Kind::Text),
            required("metric_name", Kind::Text),
            required("metric_level", Kind::Choice(&["universal"])),
            required("value", Kind::Float),
            column("unit", Kind::Text),
            column("step_number", Kind::Integer),
            column("epoch_number", Kind::Integer),
            column("measurement_method", Kind::Text),
            required("created_at", Kind::Timestamp),
        ],
    },
    Table {
        name: "datasets",
        columns: &[
            required("id", Kind::Uuid),
            required("user_id", Kind::Uuid),
            column("name", Kind::Text),
            column("file_name", Kind::Text),
            column("file_size", Kind::Bigint),
            column("storage_bucket", Kind::Text),
            column("storage_path", Kind::Text),
            column(
                "format",
                Kind::Choice(&["brightrun_lora_v4", "brightrun_lora_v3"]),
            ),
            column("status", Kind::Text),
            column("total_training_pairs", Kind::Integer),
            column("total_tokens", Kind::Bigint),
            required("created_at", Kind::Timestamp),
            required("updated_at", Kind::Timestamp),
        ],
    },
    Table {
        name: "training_jobs",
        columns: &[
            required("id", Kind::Uuid),
            required("user_id", Kind::Uuid),
            column("dataset_id", Kind::Uuid),
            column("hyperparameters", Kind::Json),
            column("gpu_config", Kind::Json),
            required("status", Kind::Text),
            column("current_stage", Kind::Text),
            column("progress", Kind::Numeric(5, 2)),
            column("current_epoch", Kind::Integer),
            column("current_step", Kind::Integer),
            column("total_steps", Kind::Integer),
            column("current_metrics", Kind::Json),
            column("external_job_id", Kind::Text),
            column("artifact_id", Kind::Uuid),
            column("error_message", Kind::Text),
            column("started_at", Kind::Timestamp),
            column("completed_at", Kind::Timestamp),
            required("created_at", Kind::Timestamp),
            required("updated_at", Kind::Timestamp),
        ],
    },
];

/// The table of this name.
pub(super) fn table(name: &str) -> Result<&'static Table, Rejection> {
    TABLES
        .iter()
        .find(|table| table.name == name)
        .ok_or_else(|| {
            let message = format!("Could not find the table 'public.{name}' in the schema cache");
            Rejection::new(404, "PGRST205", &message)
        })
}

impl Table {
    /// The column a filter or `select` names.
    pub(super) fn column(&self, name: &str) -> Result<&'static Column, Rejection> {
        let table: &'static Self = table(self.name)?;
        table
            .columns
            .iter()
            .find(|column| column.name == name)
            .ok_or_else(|| {
                Rejection::new(
                    400,
                    "42703",
                    &format!("column {}.{name} does not exist", self.name),
                )
            })
    }

    /// The fields of a request body as they would be stored.
    pub(super) fn accept(
        &self,
        fields: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Rejection> {
        let mut stored = Map::new();
        for (name, value) in fields {
            let Ok(column) = self.column(name) else {
                let message = format!(
                    "Could not find the '{name}' column of '{}' in the schema cache",
                    self.name
                );
                return Err(Rejection::new(400, "PGRST204", &message));
            };
            stored.insert(name.clone(), self.cast(column, value)?);
        }
        Ok(stored)
    }

    /// A value as its column stores it.
    fn cast(&self, column: &Column, value: &Value) -> Result<Value, Rejection> {
        if value.is_null() {
            if column.required {
                return Err(self.null_rejection(column.name));
            }
            return Ok(Value::Null);
        }
        if column.kind == Kind::Json {
            return Ok(value.clone());
        }
        // PostgreSQL reads every scalar from its text.
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        if let Kind::Choice(choices) = column.kind
            && !choices.contains(&text.as_str())
        {
            return Err(self.check_rejection(column.name));
        }
        column.kind.read(&text)
    }

    /// Fills in what the database would, and refuses a row that lacks a required value.
    pub(super) fn complete(
        &self,
        mut row: Map<String, Value>,
    ) -> Result<Map<String, Value>, Rejection> {
        let now = clock::iso8601(clock::since_epoch());
        let mut complete = Map::new();
        for column in self.columns {
            let given = row.shift_remove(column.name);
            let default = match column.name {
                "id" => json!(clock::uuid()),
                "created_at" | "updated_at" => json!(now),
                "status" if self.name != "datasets" => json!("pending"),
                "progress" => json!(0),
                "metric_level" => json!("universal"),
                _ => Value::Null,
            };
            let value = given.unwrap_or(default);
            if value.is_null() && column.required {
                return Err(self.null_rejection(column.name));
            }
            complete.insert(column.name.to_owned(), value);
        }
        Ok(complete)
    }

    fn null_rejection(&self, column: &str) -> Rejection {
        let message = format!(
            "null value in column \"{column}\" of relation \"{}\" violates not-null constraint",
            self.name
        );
        Rejection::new(400, "23502", &message)
    }

    fn check_rejection(&self, column: &str) -> Rejection {
        let table = self.name;
        let message = format!(
            "new row for relation \"{table}\" violates check constraint \"{table}_{column}_check\""
        );
        Rejection::new(400, "23514", &message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(column: &str, value: Value) -> String {
        let fields = Map::from_iter([(column.to_owned(), value)]);
        match table("pipeline_training_jobs").unwrap().accept(&fields) {
            Ok(_) => String::new(),
            Err(rejection) => rejection.body["code"].as_str().unwrap().to_owned(),
        }
    }

    #[test]
    fn values_are_read_as_postgresql_reads_them() {
        assert_eq!(code("progress", json!(45)), "");
        assert_eq!(code("progress", json!("45")), "");
        assert_eq!(code("progress", json!(45.5)), "22P02");
        assert_eq!(code("progress", json!(45.0)), "22P02");
        assert_eq!(code("progress", json!(3_000_000_000_u64)), "22003");
        assert_eq!(code("progress", json!(null)), "");
        assert_eq!(code("status", json!("done")), "23514");
        assert_eq!(code("status", json!(null)), "23502");
        assert_eq!(code("loss", json!(1)), "PGRST204");
        assert_eq!(code("started_at", json!("2026-01-10T12:00:00Z")), "");
        assert_eq!(code("started_at", json!("yesterday-ish")), "22007");
        assert_eq!(code("id", json!("job-1")), "22P02");
        assert_eq!(code("actual_cost", json!(12.345)), "");
        assert_eq!(code("actual_cost", json!(1e9)), "22003");
    }
}
