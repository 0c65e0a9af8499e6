//! Whole files over plain HTTP: `GET /files` and `POST /files`.

mod disposition;
mod download;
mod encoding;
mod staging;
mod upload;

use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Query};
use http::request::Parts;
use serde::Deserialize;

use crate::error::HttpError;
use crate::state::{Sandbox, UserError};
use crate::users::User;

pub(crate) use download::download;
pub(crate) use upload::upload;

/// The query of both requests.
#[derive(Debug, Deserialize)]
pub(crate) struct FileQuery {
    path: Option<String>,
    username: Option<String>,
}

/// [`FileQuery`], failing in envd's shape.
#[derive(Debug)]
pub(crate) struct Parameters(FileQuery);

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = HttpError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, HttpError> {
        let query = Query::<FileQuery>::from_request_parts(parts, state).await;
        let Query(query) = query.map_err(|error: QueryRejection| HttpError::bad_request(error.body_text()))?;
        Ok(Self(query))
    }
}

impl FileQuery {
    /// Whose home relative paths start at, and who owns what is uploaded.
    fn user(&self, sandbox: &Sandbox) -> Result<User, HttpError> {
        sandbox.user(self.username.as_deref().filter(|name| !name.is_empty())).map_err(|error| match error {
            UserError::Named { name, source } | UserError::Default { name, source } => {
                HttpError::unauthorized(format!("error looking up user '{name}': user: {source}"))
            }
            UserError::MalformedHeader => HttpError::unauthorized(error.to_string()),
        })
    }
}
