//! The control plane.

use bytes::Bytes;
use http::{Method, Request, Uri, header};
use http_body_util::Full;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{ClientError, Http, SandboxClient, exchange, http, parse_address};
use crate::api::{ListedSandbox, NewSandbox, Sandbox, SandboxDetail};

/// Creates, lists and kills sandboxes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: Http,
    api_url: Uri,
    sandbox_url: Uri,
    api_key: String,
}

impl Client {
    /// # Errors
    /// If an address isn't one.
    pub fn new(api_url: &str, sandbox_url: &str, api_key: &str) -> Result<Self, ClientError> {
        Ok(Self {
            http: http(),
            api_url: parse_address(api_url)?,
            sandbox_url: parse_address(sandbox_url)?,
            api_key: api_key.to_owned(),
        })
    }

    /// # Errors
    /// If the server refuses or can't be reached.
    pub async fn create(&self, request: &NewSandbox) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, "/v2/sandboxes", Some(request)).await
    }

    /// All running sandboxes of the key's team.
    ///
    /// # Errors
    /// If the server refuses or can't be reached.
    pub async fn list(&self) -> Result<Vec<ListedSandbox>, ClientError> {
        self.call(Method::GET, "/sandboxes", None::<&()>).await
    }

    /// # Errors
    /// If the server refuses or can't be reached.
    pub async fn get(&self, sandbox_id: &str) -> Result<SandboxDetail, ClientError> {
        self.call(Method::GET, &format!("/sandboxes/{sandbox_id}"), None::<&()>).await
    }

    /// # Errors
    /// If the server refuses, has no such sandbox, or can't be reached.
    pub async fn kill(&self, sandbox_id: &str) -> Result<(), ClientError> {
        self.send(Method::DELETE, &format!("/sandboxes/{sandbox_id}"), None::<&()>).await.map(drop)
    }

    /// The way into a sandbox.
    #[must_use]
    pub fn sandbox(&self, sandbox_id: &str, access_token: Option<&str>) -> SandboxClient {
        SandboxClient::new(self.http.clone(), self.sandbox_url.clone(), sandbox_id, access_token)
    }

    async fn call<Answer: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Answer, ClientError> {
        let answer = self.send(method, path, body).await?;
        serde_json::from_slice(&answer).map_err(ClientError::Answer)
    }

    async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Bytes, ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Answer)?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.api_url.to_string().trim_end_matches('/')))
            .header("X-API-Key", &self.api_key)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body.into()))
            .map_err(ClientError::Request)?;
        exchange(&self.http, request).await
    }
}
