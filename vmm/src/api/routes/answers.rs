//! What several calls may answer, each described once. Failures are made as an [`ApiError`](crate::api::error::ApiError).
#![expect(dead_code, reason = "these describe answers, and are never made")]

use utoipa::IntoResponses;

use crate::api::wire::{ErrorBody, Update};

/// The request is wrong
#[derive(IntoResponses)]
#[response(status = "4XX")]
pub(super) struct Wrong(ErrorBody);

/// The guest has ended
#[derive(IntoResponses)]
#[response(status = CONFLICT)]
pub(super) struct Ended(ErrorBody);

/// Too many operations wait
#[derive(IntoResponses)]
#[response(status = SERVICE_UNAVAILABLE)]
pub(super) struct Crowded(ErrorBody);

/// Queued (wait=false)
#[derive(IntoResponses)]
#[response(status = ACCEPTED)]
pub(super) struct Queued(Update);

/// No such update
#[derive(IntoResponses)]
#[response(status = NOT_FOUND)]
pub(super) struct NoUpdate(ErrorBody);

/// The update is not applied
#[derive(IntoResponses)]
#[response(status = CONFLICT)]
pub(super) struct NotApplied(ErrorBody);

/// Refused; the guest is as it was
#[derive(IntoResponses)]
#[response(status = UNPROCESSABLE_ENTITY)]
pub(super) struct Refused(ErrorBody);

/// Failed; the code says in what state
#[derive(IntoResponses)]
#[response(status = INTERNAL_SERVER_ERROR)]
pub(super) struct Failed(ErrorBody);

/// Not done in time; the guest is as it was
#[derive(IntoResponses)]
#[response(status = GATEWAY_TIMEOUT)]
pub(super) struct Late(ErrorBody);
