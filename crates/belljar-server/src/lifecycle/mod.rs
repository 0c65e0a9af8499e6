//! The life of every sandbox on this server.
//!
//! ```text
//!   api ──create, kill, set timeout──▶ Manager ──commands──▶ Driver (one task per sandbox)
//!   proxy ──where is sandbox X?──────▶    │                     │ create, watch, end
//!                                         │                     ▼
//!                     registry of views ◀─┴── view ──── Runtime and Store
//! ```
//!
//! Invariants:
//! - One [`driver`] task owns each sandbox from the moment its memory is promised to the moment all of it is freed;
//!   nobody else changes it. The registry holds a sandbox exactly as long.
//! - A state is persisted before it is acted on, and a caller is answered after. So whatever the record says after a
//!   crash is either what the host has, or what [`recovery`] can bring about.
//! - Requests only send commands and read views; one that is dropped half-way leaves nothing half done.

mod agent;
mod driver;
mod manager;
mod recovery;

pub(crate) use manager::{ChangeError, CreateError, CreateRequest, Idempotency, Manager, Settings};
