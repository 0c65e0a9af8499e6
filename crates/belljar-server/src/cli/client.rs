//! How commands reach a running server: the same three variables as E2B's SDKs.

use anyhow::Context;
use belljar_protocol::client::Client;
use clap::Args;

/// Where the server is and who is asking.
#[derive(Debug, Args)]
pub(super) struct Connection {
    /// Address of the API
    #[arg(long, env = "E2B_API_URL", default_value = "http://127.0.0.1:3000", value_name = "URL")]
    api_url: String,
    /// Address of the sandboxes' traffic [default: the API's]
    #[arg(long, env = "E2B_SANDBOX_URL", value_name = "URL")]
    sandbox_url: Option<String>,
    /// API key; better given by the variable, because arguments can be seen by other users
    #[arg(long, env = "E2B_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
}

impl Connection {
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        let key =
            self.api_key.as_deref().filter(|key| !key.is_empty()).context(
                "no API key: set E2B_API_KEY; `belljar key create`, as root on the server's machine, makes one",
            )?;
        Ok(Client::new(&self.api_url, self.sandbox_url.as_deref().unwrap_or(&self.api_url), key)?)
    }
}
