//! The calls about sets, which rules ask for: `arg1 in set NAME`. The guest runs on.

use axum::Json;
use axum::extract::{Path, State};
use patcher::apply::tune;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answers::{Crowded, Wrong};
use super::{Api, reply};
use crate::api::error::ApiError;
use crate::api::extract::JsonBody;
use crate::api::wire::{ErrorBody, Set, SetChange, SetList};

/// The calls, with their description.
pub(super) fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(sets))
        .routes(routes!(change, drop_set))
}

/// All sets that rules may ask for
#[utoipa::path(get, path = "/v1/sets", tag = "updates", responses((status = OK, body = SetList)))]
async fn sets(State(api): State<Api>) -> Result<Json<SetList>, ApiError> {
    let (done, answer) = reply();
    api.machine.sets(done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// Puts keys into a set, which is made if there is none of that name, and takes others out
#[utoipa::path(post, path = "/v1/sets/{name}", tag = "updates",
    params(("name" = String, Path, description = "The set's name: letters, digits and _")),
    request_body = SetChange,
    responses(
        (status = OK, body = Set),
        (status = CONFLICT, description = "A rule asks for values of 32 bits, and a key has more", body = ErrorBody),
        (status = UNPROCESSABLE_ENTITY, description = "A key finds no room, or the name is none", body = ErrorBody),
        Crowded, Wrong,
    ))]
async fn change(
    State(api): State<Api>,
    Path(name): Path<String>,
    JsonBody(change): JsonBody<SetChange>,
) -> Result<Json<Set>, ApiError> {
    let change = tune::SetChange {
        add: keys(&change.add)?,
        remove: keys(&change.remove)?,
        room: change.room,
    };
    let (done, answer) = reply();
    api.machine.change_set(name, change, done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// Does away with a set that no rule asks for
#[utoipa::path(delete, path = "/v1/sets/{name}", tag = "updates",
    params(("name" = String, Path, description = "The set's name")),
    responses(
        (status = OK, description = "It is gone", body = SetList),
        (status = NOT_FOUND, description = "No such set", body = ErrorBody),
        (status = CONFLICT, description = "A rule asks for it", body = ErrorBody),
        Wrong,
    ))]
async fn drop_set(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<SetList>, ApiError> {
    let (done, answer) = reply();
    api.machine.drop_set(name, done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// Keys as they are written: `0x...`, or decimal digits.
fn keys(texts: &[String]) -> Result<Vec<u64>, ApiError> {
    let key = |text: &String| {
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map_err(|_| {
            ApiError::malformed(format_args!(
                "a key must be a number of 64 bits, decimal or 0x and hexadecimal"
            ))
        })
    };
    texts.iter().map(key).collect()
}
