//! The calls about times, which rules go by: `during NAME`. The guest runs on.

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answers::{Crowded, Wrong};
use super::{Api, reply};
use crate::api::error::ApiError;
use crate::api::extract::JsonBody;
use crate::api::wire::{ErrorBody, Time, TimeChange, TimeList};

/// The calls, with their description.
pub(super) fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(times))
        .routes(routes!(change, drop_time))
}

/// All times that rules may go by
#[utoipa::path(get, path = "/v1/times", tag = "updates", responses((status = OK, body = TimeList)))]
async fn times(State(api): State<Api>) -> Result<Json<TimeList>, ApiError> {
    let (done, answer) = reply();
    api.machine.times(done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// Begins or ends a time, which is made if there is none of that name
#[utoipa::path(post, path = "/v1/times/{name}", tag = "updates",
    params(("name" = String, Path, description = "The time's name: letters, digits and _")),
    request_body = TimeChange,
    responses(
        (status = OK, body = Time),
        (status = UNPROCESSABLE_ENTITY, description = "The name is none", body = ErrorBody),
        Crowded, Wrong,
    ))]
async fn change(
    State(api): State<Api>,
    Path(name): Path<String>,
    JsonBody(change): JsonBody<TimeChange>,
) -> Result<Json<Time>, ApiError> {
    let (done, answer) = reply();
    api.machine.set_time(name, change.on, done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// Does away with a time that no rule goes by
#[utoipa::path(delete, path = "/v1/times/{name}", tag = "updates",
    params(("name" = String, Path, description = "The time's name")),
    responses(
        (status = OK, description = "It is gone", body = TimeList),
        (status = NOT_FOUND, description = "No such time", body = ErrorBody),
        (status = CONFLICT, description = "A rule goes by it", body = ErrorBody),
        Wrong,
    ))]
async fn drop_time(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<TimeList>, ApiError> {
    let (done, answer) = reply();
    api.machine.drop_time(name, done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}
