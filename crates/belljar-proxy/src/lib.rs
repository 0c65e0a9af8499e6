//! The data plane: a request addressed to a sandbox goes in, its bytes come out of the server inside that sandbox.
//!
//! The crate is a library. The server mounts it on the same listener as the API and hands over every request that
//! [`Proxy::route_of`] says is addressed to a sandbox:
//!
//! ```text
//!            route_of                    resolve                 connect
//!  request ───────────▶ Target ─────────────────────▶ Upstream ───────────▶ TCP stream into the sandbox
//!     │  target.rs   │          │  Sandboxes (server)    │  pool.rs, connection.rs
//!     │              │          │                        │
//!     │ not ours     │ malformed│ not running            │ port closed, no answer
//!     ▼              ▼          ▼                        ▼
//!    API            400        502 / 409 / 503          502 / 504                        refusal.rs, page.rs
//! ```
//!
//! In between stand the checks, in this order: control paths of the agent (`reserved.rs`), the traffic access token
//! (`proxy.rs`), the limits on connections (`pool.rs`). `headers.rs` decides what crosses; `exchange.rs` carries one
//! request, `tunnel.rs` what was upgraded from one (WebSocket).
//!
//! Invariants:
//! - No body is buffered: every byte waits in the sender until the receiver takes it.
//! - One request in flight holds one `Permit`, from its admission to the last byte of its answer or the
//!   end of its tunnel. What drops the permit frees the connection, and nothing else does.
//! - A connection belongs to one generation of one sandbox and is never used for another.

mod body;
mod config;
mod connection;
mod exchange;
mod headers;
mod page;
mod pool;
mod proxy;
mod refusal;
mod reserved;
mod sandboxes;
mod target;
mod tunnel;

pub use body::Body;
pub use config::Config;
pub use headers::Client;
pub use proxy::{Drained, Proxy};
pub use sandboxes::{DEFAULT_MAX_CONNECTIONS, Sandboxes, Unresolved, Upstream};
pub use target::{AGENT_PORT, BadTarget, Domains, InvalidDomain, Target};

/// An error of somebody else's making, carried along.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
