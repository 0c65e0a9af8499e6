//! What an operator can set. Every limit has a default.

use std::time::Duration;

use crate::target::Domains;

/// The settings of a [`Proxy`](crate::Proxy).
#[derive(Debug, Clone)]
pub struct Config {
    /// The domains whose subdomains `PORT-SANDBOXID` address sandboxes. None: only headers do.
    pub domains: Domains,
    /// Believe the `X-Forwarded-*` headers of a request. Only right when another proxy stands in front and replaces
    /// what strangers wrote there; otherwise anybody could claim any address. Default: no.
    pub trust_forwarded_headers: bool,
    /// How long a sandbox may take to accept a connection. A closed port refuses at once, so this bounds only the
    /// unusual: a packet filter inside the sandbox, or one too busy to answer. Default: 5 s.
    pub connect_timeout: Duration,
    /// How long a server may take from receiving a request to the head of its answer. Default: no limit, like E2B, as
    /// long polling is legitimate and the limits on connections bound what it can cost.
    pub header_timeout: Option<Duration>,
    /// How long a connection without a request is kept for the next one. It has to be shorter than what servers
    /// usually allow before they close it themselves (gunicorn 2 s, Node.js and uvicorn 5 s): a request that meets
    /// the closing of its connection can't be repeated if it has a body. Default: 1.5 s.
    pub idle_timeout: Duration,
    /// The most connections without a request, over all sandboxes. Default: 1,024.
    pub max_idle: usize,
    /// The most requests and tunnels in flight, over all sandboxes; the limit per sandbox is
    /// [`Upstream::max_connections`](crate::Upstream::max_connections). Each needs two file descriptors. Default:
    /// 10,000.
    pub max_in_flight: usize,
}

impl Config {
    /// The defaults, for these domains.
    #[must_use]
    pub fn new(domains: Domains) -> Self {
        Self {
            domains,
            trust_forwarded_headers: false,
            connect_timeout: Duration::from_secs(5),
            header_timeout: None,
            idle_timeout: Duration::from_millis(1_500),
            max_idle: 1_024,
            max_in_flight: 10_000,
        }
    }
}
