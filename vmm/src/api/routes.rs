//! The calls of the API: each reads a request, calls the machine, and says what came of it.
//!
//! A handler runs in a task of its own: a client that goes away ends no operation, and a panic is a 500 with the same
//! body as every other failure.

mod answers;
mod kernel;
mod sets;
mod times;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::patcher::edition::clone::MAX_CLONES;
use ::patcher::rule::Rule;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response, Sse};
use axum::{Json, Router};
use tokio::sync::{oneshot, watch};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::answers::{Crowded, Ended, Failed, Late, NoUpdate, NotApplied, Queued, Refused, Wrong};
use super::convert;
use super::error::ApiError;
use super::events;
use super::extract::{Id, JsonBody, Octets, Options, deadline};
use super::machine::{Done, Machine};
use super::metrics;
use super::wire::{
    ApplyQuery, CallList, DeadlineQuery, Dump, DumpRequest, ErrorBody, Event, EventsQuery,
    ForceQuery, Health, Kernel, PowerButton, RevertQuery, Stop, Transition, Update, UpdateList,
    UseQuery, Verification, Vm,
};
use crate::updates::{Brings, InsteadOf, Order, Use};

/// How long those who collect metrics wait for what is counted in the guest: they come again.
const COUNTS_WITHIN: Duration = Duration::from_secs(1);
/// Longest name of an update, in bytes.
const NAME_LIMIT: usize = 128;

/// What the handlers share.
#[derive(Clone)]
pub(super) struct Api {
    machine: Arc<dyn Machine>,
    /// Becomes true when the server stops: event streams then end.
    stop: watch::Receiver<bool>,
}

impl Api {
    pub(super) fn new(machine: Arc<dyn Machine>, stop: watch::Receiver<bool>) -> Self {
        Self { machine, stop }
    }

    /// Runs a call of the machine that may block, beside the event loop.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Machine) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let machine = Arc::clone(&self.machine);
        tokio::task::spawn_blocking(move || call(&*machine))
            .await
            .map_err(ApiError::internal)?
    }
}

/// All calls, with their description.
pub(super) fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(vm))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(power_button))
        .routes(routes!(kill))
        .routes(routes!(dump))
        .routes(routes!(kernel))
        .merge(kernel::described())
        .routes(routes!(follow))
        .routes(routes!(updates, apply))
        .routes(routes!(update))
        .routes(routes!(revert))
        .routes(routes!(reuse))
        .routes(routes!(force))
        .routes(routes!(calls))
        .merge(sets::described())
        .merge(times::described())
        .routes(routes!(metrics_page))
        .routes(routes!(verify))
        .routes(routes!(openapi))
}

/// All calls, ready to be served.
pub(super) fn router(api: Api) -> Router {
    let (router, _description) = described().split_for_parts();
    router
        .fallback(async |method: Method, uri: Uri| ApiError::no_route(method, uri.path()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::wrong_method(method, uri.path())
        })
        .layer(axum::middleware::from_fn(isolate))
        .with_state(api)
}

/// Runs a handler in a task of its own.
async fn isolate(request: Request, next: Next) -> Response {
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(died) => {
            tracing::error!(%died, "an API call panicked");
            ApiError::internal(died).into_response()
        }
    }
}

/// Answers when the server does
#[utoipa::path(get, path = "/v1/health", tag = "server", responses((status = OK, body = Health)))]
async fn health() -> Json<Health> {
    Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    })
}

/// The virtual machine
#[utoipa::path(get, path = "/v1/vm", tag = "vm", responses((status = OK, body = Vm)))]
async fn vm(State(api): State<Api>) -> Result<Json<Vm>, ApiError> {
    api.call(|machine| Ok(Json(machine.vm()))).await
}

/// Stops all vCPUs and devices; pausing a paused VM changes nothing
#[utoipa::path(post, path = "/v1/vm/pause", tag = "vm", params(DeadlineQuery), responses(
    (status = OK, body = Transition),
    (status = GATEWAY_TIMEOUT, description = "Not stopped in time; runs as before", body = ErrorBody),
    Ended, Wrong,
))]
async fn pause(
    State(api): State<Api>,
    Options(query): Options<DeadlineQuery>,
) -> Result<Json<Transition>, ApiError> {
    let within = deadline(query.deadline_ms)?;
    api.call(move |machine| {
        let began = Instant::now();
        let stop = machine.pause(within)?;
        Ok(transition(machine, began, stop.is_some(), stop))
    })
    .await
}

/// Lets the vCPUs and devices go; resuming a running VM changes nothing
#[utoipa::path(post, path = "/v1/vm/resume", tag = "vm", responses(
    (status = OK, body = Transition),
    (status = CONFLICT, description = "The guest has ended, or must stay paused", body = ErrorBody),
))]
async fn resume(State(api): State<Api>) -> Result<Json<Transition>, ApiError> {
    api.call(|machine| {
        let began = Instant::now();
        let changed = machine.resume()?;
        Ok(transition(machine, began, changed, None))
    })
    .await
}

fn transition(
    machine: &dyn Machine,
    began: Instant,
    changed: bool,
    stop: Option<Stop>,
) -> Json<Transition> {
    Json(Transition {
        changed,
        took_us: convert::us(began.elapsed()),
        stop,
        vm: machine.vm(),
    })
}

/// Presses the ACPI power button; the guest decides what it does then
#[utoipa::path(post, path = "/v1/vm/power-button", tag = "vm", responses(
    (status = ACCEPTED, body = PowerButton),
    Ended,
))]
async fn power_button(State(api): State<Api>) -> Result<(StatusCode, Json<PowerButton>), ApiError> {
    api.call(|machine| {
        let heard = machine.power_button()?;
        Ok((StatusCode::ACCEPTED, Json(PowerButton { heard })))
    })
    .await
}

/// Ends the guest at once, as pulling the plug would
#[utoipa::path(post, path = "/v1/vm/kill", tag = "vm", responses(
    (status = ACCEPTED, body = Vm),
    (status = CONFLICT, description = "The guest has ended already", body = ErrorBody),
))]
async fn kill(State(api): State<Api>) -> Result<(StatusCode, Json<Vm>), ApiError> {
    api.call(|machine| {
        machine.kill()?;
        Ok((StatusCode::ACCEPTED, Json(machine.vm())))
    })
    .await
}

/// Writes the guest's memory and registers to a new ELF core file on the host; pauses the guest meanwhile
#[utoipa::path(post, path = "/v1/vm/dump", tag = "vm", request_body = DumpRequest, responses(
    (status = CREATED, body = Dump),
    (status = CONFLICT, description = "The file exists, or the guest has ended", body = ErrorBody),
    (status = GATEWAY_TIMEOUT, description = "Not stopped in time", body = ErrorBody),
    Wrong,
))]
async fn dump(
    State(api): State<Api>,
    JsonBody(request): JsonBody<DumpRequest>,
) -> Result<(StatusCode, Json<Dump>), ApiError> {
    let within = deadline(request.deadline_ms)?;
    let path = std::path::PathBuf::from(request.path);
    if !path.is_absolute() {
        return Err(ApiError::malformed(format_args!(
            "path is {path:?}; it must be absolute, as the server runs in another directory"
        )));
    }
    let written = api.call(move |machine| machine.dump(&path, within)).await?;
    Ok((StatusCode::CREATED, Json(written)))
}

/// The guest's kernel; the first call reads the kernel's image, and pauses the guest to find it in memory
#[utoipa::path(get, path = "/v1/kernel", tag = "kernel", params(DeadlineQuery), responses(
    (status = OK, body = Kernel),
    (status = UNPROCESSABLE_ENTITY, description = "The image cannot be read", body = ErrorBody),
    Wrong,
))]
async fn kernel(
    State(api): State<Api>,
    Options(query): Options<DeadlineQuery>,
) -> Result<Json<Kernel>, ApiError> {
    let deadline = Instant::now() + deadline(query.deadline_ms)?;
    let (done, answer) = reply();
    api.machine.kernel(deadline, done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// What happens from now on, or after `Last-Event-ID`, as a server-sent event stream
#[utoipa::path(get, path = "/v1/events", tag = "events",
    params(EventsQuery, ("Last-Event-ID" = Option<u64>, Header, description = "Go on after this event")),
    responses(
        (status = OK, description = "A stream; each event's data is one Event",
            content_type = "text/event-stream", body = Event),
        Wrong,
    ))]
async fn follow(
    State(api): State<Api>,
    headers: HeaderMap,
    Options(query): Options<EventsQuery>,
) -> Result<Response, ApiError> {
    let last_seen = match headers.get("last-event-id") {
        None => query.after,
        Some(id) => {
            let id = id.to_str().ok().and_then(|id| id.parse().ok());
            Some(id.ok_or_else(|| ApiError::malformed("Last-Event-ID is not the id of an event"))?)
        }
    };
    let stream = events::stream(api.machine, last_seen, api.stop);
    let keep_alive = axum::response::sse::KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(stream).keep_alive(keep_alive).into_response())
}

/// All updates, oldest first
#[utoipa::path(get, path = "/v1/updates", tag = "updates", responses((status = OK, body = UpdateList)))]
async fn updates(State(api): State<Api>) -> Json<UpdateList> {
    Json(UpdateList {
        updates: api.machine.updates(),
    })
}

/// One update
#[utoipa::path(get, path = "/v1/updates/{id}", tag = "updates",
    params(("id" = u64, Path, description = "Number of the update")),
    responses(
        (status = OK, body = Update),
        NoUpdate,
    ))]
async fn update(State(api): State<Api>, Id(id): Id) -> Result<Json<Update>, ApiError> {
    let mut updates = api.machine.updates().into_iter();
    let found = updates.find(|update| update.id == id);
    found.map(Json).ok_or_else(|| ApiError::no_update(id))
}

/// Applies (or only checks) an update package, or clones of the kernel's own functions; it is applied whole or not at all, whether the client stays or not
#[utoipa::path(post, path = "/v1/updates", tag = "updates", params(ApplyQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The .xpu file; empty with `clone`"),
    responses(
        (status = CREATED, description = "Applied", body = Update),
        (status = OK, description = "Checked; nothing was written", body = Update),
        (status = CONFLICT, description = "The guest's state does not allow it", body = ErrorBody),
        Queued, Refused, Failed, Crowded, Late, Wrong,
    ))]
async fn apply(
    State(api): State<Api>,
    Options(query): Options<ApplyQuery>,
    Octets(package): Octets,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + deadline(query.deadline_ms)?;
    let name = query.name.unwrap_or_default();
    if name.len() > NAME_LIMIT || name.chars().any(char::is_control) {
        return Err(ApiError::malformed(format_args!(
            "name must be at most {NAME_LIMIT} bytes without control characters"
        )));
    }
    let check = query.check;
    let status = if check {
        StatusCode::OK
    } else {
        StatusCode::CREATED
    };
    let (done, ended) = reply();
    let order = Order {
        brings: brings(package, query.clone.as_deref())?,
        name,
        check,
        instead_of: instead_of(query.instead_of.as_deref())?,
        model: query.model.map(convert::asked_model),
        how: how(query.rule.as_deref(), query.count)?,
        deadline,
    };
    let queued = api.machine.apply(order, done)?;
    settle(queued, ended, query.wait, status).await
}

/// What an update brings: a package, or clones of the functions that an option names.
fn brings(package: Vec<u8>, clones: Option<&str>) -> Result<Brings, ApiError> {
    let Some(clones) = clones else {
        return Ok(Brings::Package(package));
    };
    let names: Vec<String> = clones.split(',').map(str::to_owned).collect();
    let named = |name: &String| !name.is_empty() && !name.chars().any(char::is_control);
    if !package.is_empty() || names.len() > MAX_CLONES || !names.iter().all(named) {
        return Err(ApiError::malformed(format_args!(
            "clone must be the names of at most {MAX_CLONES} functions with commas between them, and the body empty"
        )));
    }
    Ok(Brings::Clones(names))
}

/// The updates that an option names: `all`, or numbers with commas between them.
fn instead_of(option: Option<&str>) -> Result<InsteadOf, ApiError> {
    let these: Result<Vec<u64>, _> = match option {
        None => return Ok(InsteadOf::These(Vec::new())),
        Some("all") => return Ok(InsteadOf::All),
        Some(these) => these.split(',').map(str::parse).collect(),
    };
    these.map(InsteadOf::These).map_err(|_| {
        ApiError::malformed(format_args!(
            "instead_of must be `all`, or the numbers of updates with commas between them"
        ))
    })
}

/// How editions are to be used.
fn how(rule: Option<&str>, counted: bool) -> Result<Use, ApiError> {
    let rule = rule.map(Rule::parse).transpose();
    let rule = rule.map_err(|error| ApiError::rule(&error))?;
    Ok(Use {
        rule: rule.map(Arc::new),
        counted,
    })
}

/// Uses the editions of an applied update for other calls, or counts them
#[utoipa::path(post, path = "/v1/updates/{id}/use", tag = "updates",
    params(("id" = u64, Path, description = "Number of the update"), UseQuery),
    responses(
        (status = OK, description = "They are used so from now on", body = Update),
        (status = UNPROCESSABLE_ENTITY, description = "Refused; they are used as before", body = ErrorBody),
        (status = GATEWAY_TIMEOUT, description = "Not done in time; they are used as before", body = ErrorBody),
        Queued, NoUpdate, NotApplied, Failed, Wrong,
    ))]
async fn reuse(
    State(api): State<Api>,
    Id(id): Id,
    Options(query): Options<UseQuery>,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + deadline(query.deadline_ms)?;
    let how = how(query.rule.as_deref(), query.count)?;
    let (done, ended) = reply();
    let queued = api.machine.reuse(id, how, deadline, done)?;
    settle(queued, ended, query.wait, StatusCode::OK).await
}

/// Ends the switch of an update for the tasks too that have yet to leave its old side: they may then run old code of one function
/// beneath new code of another
#[utoipa::path(post, path = "/v1/updates/{id}/force", tag = "updates",
    params(("id" = u64, Path, description = "Number of the update"), ForceQuery),
    responses(
        (status = OK, description = "Nobody is bound to the old side any more", body = Update),
        (status = CONFLICT, description = "The update is not being switched", body = ErrorBody),
        (status = GATEWAY_TIMEOUT, description = "Not done in time", body = ErrorBody),
        Queued, NoUpdate, Wrong,
    ))]
async fn force(
    State(api): State<Api>,
    Id(id): Id,
    Options(query): Options<ForceQuery>,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + deadline(query.deadline_ms)?;
    let (done, ended) = reply();
    let queued = api.machine.force(id, deadline, done)?;
    settle(queued, ended, query.wait, StatusCode::OK).await
}

/// How often functions' editions were called, where that is counted; the guest runs on
#[utoipa::path(get, path = "/v1/calls", tag = "updates", responses((status = OK, body = CallList)))]
async fn calls(State(api): State<Api>) -> Result<Json<CallList>, ApiError> {
    let (done, answer) = reply();
    api.machine.counted(done)?;
    let counted = answer.await.map_err(ApiError::internal)??;
    Ok(Json(counted.calls))
}

/// What is worth watching, in Prometheus' text format; what is not known within a second is left out, and a comment says why
#[utoipa::path(get, path = "/metrics", tag = "server", responses((status = OK,
    description = "Calls by function and edition, updates and editions by state, bound tasks by update, pauses, the arena, vCPUs, uptime",
    content_type = "text/plain; version=0.0.4; charset=utf-8", body = String)))]
async fn metrics_page(State(api): State<Api>) -> Result<Response, ApiError> {
    let (done, answer) = reply();
    let counted = match api.machine.counted(done) {
        Err(error) => Err(error.body.cause),
        Ok(()) => match tokio::time::timeout(COUNTS_WITHIN, answer).await {
            Err(_elapsed) => Err("an operation is under way".to_owned()),
            Ok(Err(died)) => Err(died.to_string()),
            Ok(Ok(counted)) => counted.map_err(|error| error.body.cause),
        },
    };
    let text = api.call(move |machine| {
        let (vm, updates) = (machine.vm(), machine.updates());
        let counted = counted.as_ref().map_err(String::as_str);
        Ok(metrics::page(&vm, &updates, counted))
    });
    let content_type = [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)];
    Ok((content_type, text.await?).into_response())
}

/// Undoes an applied update
#[utoipa::path(post, path = "/v1/updates/{id}/revert", tag = "updates",
    params(("id" = u64, Path, description = "Number of the update"), RevertQuery),
    responses(
        (status = OK, description = "Reverted", body = Update),
        Queued, NoUpdate, NotApplied, Refused, Failed, Late, Wrong,
    ))]
async fn revert(
    State(api): State<Api>,
    Id(id): Id,
    Options(query): Options<RevertQuery>,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + deadline(query.deadline_ms)?;
    let model = query.model.map(convert::asked_model);
    let (done, ended) = reply();
    let queued = api.machine.revert(id, model, deadline, done)?;
    settle(queued, ended, query.wait, StatusCode::OK).await
}

/// A callback for an answer, and where the answer arrives.
fn reply<T: Send + 'static>() -> (Done<T>, oneshot::Receiver<Result<T, ApiError>>) {
    let (send, receive) = oneshot::channel();
    // A failure to send means that nobody waits for the answer.
    (Box::new(move |answer| drop(send.send(answer))), receive)
}

/// The answer to an operation: its end, or where to follow it.
async fn settle(
    queued: Update,
    ended: oneshot::Receiver<Result<Update, ApiError>>,
    wait: Option<bool>,
    success: StatusCode,
) -> Result<Response, ApiError> {
    let (status, update) = if wait == Some(false) {
        (StatusCode::ACCEPTED, queued)
    } else {
        (success, ended.await.map_err(ApiError::internal)??)
    };
    let location =
        HeaderValue::try_from(format!("/v1/updates/{}", update.id)).map_err(ApiError::internal)?;
    Ok((status, [(header::LOCATION, location)], Json(update)).into_response())
}

/// Compares the guest's memory with what an applied update wrote
#[utoipa::path(post, path = "/v1/updates/{id}/verify", tag = "updates",
    params(("id" = u64, Path, description = "Number of the update"), DeadlineQuery),
    responses(
        (status = OK, body = Verification),
        NoUpdate, NotApplied, Wrong,
    ))]
async fn verify(
    State(api): State<Api>,
    Id(id): Id,
    Options(query): Options<DeadlineQuery>,
) -> Result<Json<Verification>, ApiError> {
    let deadline = Instant::now() + deadline(query.deadline_ms)?;
    let (done, answer) = reply();
    api.machine.verify(id, deadline, done)?;
    answer.await.map_err(ApiError::internal)?.map(Json)
}

/// This description
#[utoipa::path(get, path = "/openapi.json", tag = "server", responses(
    (status = OK, description = "An OpenAPI 3.1 document", content_type = "application/json"),
))]
async fn openapi() -> Result<Response, ApiError> {
    let json = super::openapi::json().map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}
