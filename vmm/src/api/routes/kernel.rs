//! The calls that look at the guest's kernel. Each pauses the guest for itself, at most once a try, and lets it go before the answer is written.

use std::time::Instant;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Api, reply};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::extract::{Options, deadline};
use crate::api::wire::{DeadlineQuery, ErrorBody};
use crate::views::disasm::Disassembly;
use crate::views::log::Log;
use crate::views::modules::Modules;
use crate::views::stack::Stacks;
use crate::views::symbols::Symbols;
use crate::views::tasks::Tasks;
use crate::views::text::Text;
use crate::views::types::Types;
use crate::views::{Asked, Seen, ViewError, at, disasm, stack, symbols, text, types};

/// The calls, with their description.
pub(super) fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(kernel_symbols))
        .routes(routes!(kernel_types))
        .routes(routes!(kernel_modules))
        .routes(routes!(kernel_tasks))
        .routes(routes!(kernel_log))
        .routes(routes!(kernel_text))
        .routes(routes!(kernel_stack))
        .routes(routes!(kernel_disasm))
}

/// Which symbols.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct SymbolsQuery {
    /// A symbol's name, or an address of the running kernel: `0x...`, or 16 hexadecimal digits. All symbols when left out.
    of: Option<String>,
    /// Give up after this many milliseconds (1 to 600000). 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    deadline_ms: Option<u64>,
}

/// Which type.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct TypesQuery {
    /// The type: a name, or one with its kind: `struct task_struct`.
    name: String,
    /// Where this member lies: through members (`thread.sp`) and array elements (`slots[3]`). The whole type when left out.
    member: Option<String>,
    /// The module whose types are looked among first, which the guest must have loaded. The kernel's types alone when left out.
    module: Option<String>,
    /// Give up after this many milliseconds (1 to 600000). 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    deadline_ms: Option<u64>,
}

/// What of the text.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct TextQuery {
    /// Give every difference, not only those that nothing explains.
    #[serde(default)]
    each: bool,
    /// Give up after this many milliseconds (1 to 600000). 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    deadline_ms: Option<u64>,
}

/// Whose stack.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct StackQuery {
    /// A thread's id (0 are the idle tasks), `cpuN` for the vCPU N, or `all`, as when left out.
    of: Option<String>,
    /// Instead: the stacks of vCPUs that come to this place of the code, at the moment when they do; a function's name, `NAME+OFFSET`, or an
    /// address. The guest runs until then. Its own hardware breakpoints would not work meanwhile: it is refused while there are any.
    at: Option<String>,
    /// Which of several functions of that name, from 1 in the order of addresses, the modules' behind the kernel's own. With `at`.
    position: Option<usize>,
    /// So many stacks, 1 when left out. With `at`.
    #[param(minimum = 1, maximum = 1000)]
    count: Option<usize>,
    /// Give up after this many milliseconds (1 to 600000). 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    deadline_ms: Option<u64>,
}

/// Which function.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct DisasmQuery {
    /// The function: `NAME`, `NAME+OFFSET`, or an address in it.
    of: String,
    /// Which of several of that name, from 1 in the order of addresses, the modules' behind the kernel's own.
    position: Option<usize>,
    /// Give up after this many milliseconds (1 to 600000). 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    deadline_ms: Option<u64>,
}

/// What answers every call where nothing can be seen.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "it is described here, and made as an ApiError")]
enum Unseen {
    /// Not stopped or not found in time
    #[response(status = GATEWAY_TIMEOUT)]
    Late(ErrorBody),
    /// The request is wrong, or the kernel cannot be read
    #[response(status = "4XX")]
    Wrong(ErrorBody),
}

/// Asks for a view, and waits for it.
async fn see(
    api: &Api,
    asked: Result<Asked, ViewError>,
    deadline_ms: Option<u64>,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + deadline(deadline_ms)?;
    let asked = asked.map_err(|wrong| convert::view_error(&wrong))?;
    let (done, answer) = reply();
    api.machine.view(asked, deadline, done)?;
    let seen = answer.await.map_err(ApiError::internal)??;
    // Megabytes of text are made where no other call waits for it.
    let written = tokio::task::spawn_blocking(move || serde_json::to_vec(&seen));
    let json = written
        .await
        .map_err(ApiError::internal)?
        .map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

/// The symbols of the kernel and its modules: all, those of a name, or what is at an address
#[utoipa::path(get, path = "/v1/kernel/symbols", tag = "kernel", params(SymbolsQuery), responses(
    (status = OK, body = Seen<Symbols>),
    (status = NOT_FOUND, description = "No such symbol", body = ErrorBody),
    Unseen,
))]
async fn kernel_symbols(
    State(api): State<Api>,
    Options(query): Options<SymbolsQuery>,
) -> Result<Response, ApiError> {
    let of = query.of.as_deref().map(symbols::Asked::parse).transpose();
    see(&api, of.map(Asked::Symbols), query.deadline_ms).await
}

/// A type as C with the place of every member, or where one member lies; pauses the guest only for the types of a module
#[utoipa::path(get, path = "/v1/kernel/types", tag = "kernel", params(TypesQuery), responses(
    (status = OK, body = Seen<Types>),
    (status = NOT_FOUND, description = "No such type, member or module", body = ErrorBody),
    (status = GATEWAY_TIMEOUT, description = "Not stopped or not found in time", body = ErrorBody),
    (status = "4XX", description = "The request is wrong, or the image cannot be read", body = ErrorBody),
))]
async fn kernel_types(
    State(api): State<Api>,
    Options(query): Options<TypesQuery>,
) -> Result<Response, ApiError> {
    let asked = types::Asked::parse(
        &query.name,
        query.member.as_deref(),
        query.module.as_deref(),
    );
    see(&api, Ok(Asked::Types(asked)), query.deadline_ms).await
}

/// The modules that are loaded, as `/proc/modules` lists them
#[utoipa::path(get, path = "/v1/kernel/modules", tag = "kernel", params(DeadlineQuery), responses(
    (status = OK, body = Seen<Modules>),
    Unseen,
))]
async fn kernel_modules(
    State(api): State<Api>,
    Options(query): Options<DeadlineQuery>,
) -> Result<Response, ApiError> {
    see(&api, Ok(Asked::Modules), query.deadline_ms).await
}

/// All tasks: processes, threads, kernel threads and idle tasks, with their stacks
#[utoipa::path(get, path = "/v1/kernel/tasks", tag = "kernel", params(DeadlineQuery), responses(
    (status = OK, body = Seen<Tasks>),
    Unseen,
))]
async fn kernel_tasks(
    State(api): State<Api>,
    Options(query): Options<DeadlineQuery>,
) -> Result<Response, ApiError> {
    see(&api, Ok(Asked::Tasks), query.deadline_ms).await
}

/// The kernel's log, as `dmesg` in the guest prints it
#[utoipa::path(get, path = "/v1/kernel/log", tag = "kernel", params(DeadlineQuery), responses(
    (status = OK, body = Seen<Log>),
    Unseen,
))]
async fn kernel_log(
    State(api): State<Api>,
    Options(query): Options<DeadlineQuery>,
) -> Result<Response, ApiError> {
    see(&api, Ok(Asked::Log), query.deadline_ms).await
}

/// Every difference of the kernel's text from its image, and the cause of each
#[utoipa::path(get, path = "/v1/kernel/text", tag = "kernel", params(TextQuery), responses(
    (status = OK, body = Seen<Text>),
    (status = CONFLICT, description = "The kernel boots, or is changing its text", body = ErrorBody),
    Unseen,
))]
async fn kernel_text(
    State(api): State<Api>,
    Options(query): Options<TextQuery>,
) -> Result<Response, ApiError> {
    let asked = text::Asked { each: query.each };
    see(&api, Ok(Asked::Text(asked)), query.deadline_ms).await
}

/// Stacks frame by frame: of a task, of a vCPU, of all, or of vCPUs that come to a place of the code; each is reliable, or unreliable with the reason and the place
#[utoipa::path(get, path = "/v1/kernel/stack", tag = "kernel", params(StackQuery), responses(
    (status = OK, body = Seen<Stacks>),
    (status = NOT_FOUND, description = "No such task, vCPU or function", body = ErrorBody),
    (status = CONFLICT, description = "Nobody can come there: the guest is paused, or has hardware breakpoints of its own", body = ErrorBody),
    Unseen,
))]
async fn kernel_stack(
    State(api): State<Api>,
    Options(query): Options<StackQuery>,
) -> Result<Response, ApiError> {
    let asked = match query.at.as_deref() {
        Some(_) if query.of.is_some() => {
            return Err(ApiError::malformed("of and at cannot both be given"));
        }
        None if query.position.or(query.count).is_some() => {
            return Err(ApiError::malformed("position and count need at"));
        }
        Some(place) => at::Asked::parse(place, query.position, query.count).map(Asked::At),
        None => {
            let of = query.of.as_deref();
            let of = of.map_or(Ok(stack::Asked::All), stack::Asked::parse);
            of.map(Asked::Stack)
        }
    };
    see(&api, asked, query.deadline_ms).await
}

/// The instructions of a function in the guest's memory, beside those of the image where they differ, with the cause
#[utoipa::path(get, path = "/v1/kernel/disasm", tag = "kernel", params(DisasmQuery), responses(
    (status = OK, body = Seen<Disassembly>),
    (status = NOT_FOUND, description = "No such function", body = ErrorBody),
    Unseen,
))]
async fn kernel_disasm(
    State(api): State<Api>,
    Options(query): Options<DisasmQuery>,
) -> Result<Response, ApiError> {
    let asked = disasm::Asked::parse(&query.of, query.position);
    see(&api, asked.map(Asked::Disasm), query.deadline_ms).await
}
