//! Rows of the project's database, over its REST interface.
//!
//! Nothing is retried here, but for one thing: a request that may be sent twice is sent again at once when the kept
//! connection it went out on was dead.

use reqwest::{Method, RequestBuilder};
use serde_json::{Map, Value};
use url::Url;

use super::error::ServiceError;
use super::{Result, Supabase, TIMEOUT, at};

/// One row, by column.
pub type Row = Map<String, Value>;

/// A column and a condition in the interface's own words: `("id", "eq.42")`, `("status", "neq.cancelled")`.
pub type Filter<'a> = (&'a str, &'a str);

impl Supabase {
    /// The rows of `table` that match every filter; `select` names columns, `*` for all.
    ///
    /// # Errors
    /// [`ServiceError`]: a refusal of the database, or no answer within 10 s.
    pub async fn get(&self, table: &str, filters: &[Filter<'_>], select: &str) -> Result<Vec<Row>> {
        let mut url = self.table(table, filters);
        url.query_pairs_mut().append_pair("select", select);
        let request = self.request(Method::GET, url).timeout(TIMEOUT);
        let response = self.send_again(request).await;
        let response = response.map_err(|error| refused(error, &format!("reading `{table}`")))?;
        rows(self.json(response).await?)
    }

    /// Writes `body` over the rows of `table` that match every filter. With `returning`, gives the rows written, none
    /// if no row matched.
    ///
    /// # Errors
    /// [`ServiceError`] as for [`Supabase::get`]; `InvalidSettings` without any filter: that would write every row.
    pub async fn patch(
        &self,
        table: &str,
        filters: &[Filter<'_>],
        body: &Row,
        returning: bool,
    ) -> Result<Vec<Row>> {
        if filters.is_empty() {
            return Err(ServiceError::settings("an update needs a filter"));
        }
        let request = self
            .request(Method::PATCH, self.table(table, filters))
            .json(body);
        let request = prefer(request, returning).timeout(TIMEOUT);
        let response = self.send_again(request).await;
        let response = response.map_err(|error| refused(error, &format!("writing `{table}`")))?;
        if returning {
            return rows(self.json(response).await?);
        }
        Ok(Vec::new())
    }

    /// Adds rows to `table`. It is sent once: a second time would add them twice.
    ///
    /// # Errors
    /// [`ServiceError`] as for [`Supabase::get`].
    pub async fn insert(&self, table: &str, rows: &[Row]) -> Result<()> {
        let request = self
            .request(Method::POST, self.table(table, &[]))
            .json(rows);
        let request = prefer(request, false).timeout(TIMEOUT);
        let response = self.send(request).await;
        response.map_err(|error| refused(error, &format!("adding to `{table}`")))?;
        Ok(())
    }

    fn table(&self, table: &str, filters: &[Filter<'_>]) -> Url {
        let mut url = at(&self.url, ["rest", "v1", table]);
        if !filters.is_empty() {
            url.query_pairs_mut().extend_pairs(filters);
        }
        url
    }
}

fn prefer(request: RequestBuilder, returning: bool) -> RequestBuilder {
    let preference = if returning {
        "return=representation"
    } else {
        "return=minimal"
    };
    request.header("Prefer", preference)
}

/// To the database a conflict is a broken constraint, which stays.
fn refused(mut error: ServiceError, attempted: &str) -> ServiceError {
    error.retryable &= error.status != 409;
    error.during(attempted, "")
}

fn rows(answer: Value) -> Result<Vec<Row>> {
    let unexpected = || ServiceError::unexpected("answer is no list of rows".to_owned());
    let Value::Array(items) = answer else {
        return Err(unexpected());
    };
    let row = |item| {
        if let Value::Object(row) = item {
            return Ok(row);
        }
        Err(unexpected())
    };
    items.into_iter().map(row).collect()
}
