//! Connect codes of the failures that both services share. The SDKs choose their exception by the code.

use connectrpc::ConnectError;

use crate::paths::PathError;
use crate::state::UserError;

pub(crate) fn user(error: UserError) -> ConnectError {
    ConnectError::unauthenticated(error.to_string())
}

pub(crate) fn path(error: PathError) -> ConnectError {
    ConnectError::invalid_argument(error.to_string())
}
