//! The OpenAPI 3.1 description of the API, made from the handlers and the wire types.
//!
//! A copy is checked in at `vmm/openapi.json`, so that changes of the API are seen in review.

use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi};

/// The description.
#[must_use]
pub fn document() -> OpenApi {
    let mut document = super::routes::described().into_openapi();
    document.info = InfoBuilder::new()
        .title("exopatch")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Controls a virtual machine and updates the Linux kernel that runs in it. Served on a unix socket. \
             Every failed call answers with an ErrorBody.",
        ))
        .license(Some(
            LicenseBuilder::new()
                .name("Apache-2.0 OR MIT")
                .identifier(Some("Apache-2.0 OR MIT"))
                .build(),
        ))
        .build();
    document
}

/// The description as JSON text, with a line break at its end.
///
/// # Errors
/// When it cannot be written as JSON, which would be a defect of its types.
pub fn json() -> Result<String, serde_json::Error> {
    let mut json = document().to_pretty_json()?;
    json.push('\n');
    Ok(json)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checked_in_description_is_current() {
        let current = super::json().unwrap();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        let checked_in = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            checked_in == current,
            "vmm/openapi.json is stale: refresh it with `cargo run -p vmm -- openapi > vmm/openapi.json`"
        );
    }

    #[test]
    fn the_description_is_openapi_3_1_and_describes_every_failure() {
        let document: serde_json::Value = serde_json::from_str(&super::json().unwrap()).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        for (path, calls) in document["paths"].as_object().unwrap() {
            for (method, call) in calls.as_object().unwrap() {
                assert!(
                    call["summary"].is_string(),
                    "{method} {path} has no summary"
                );
                for (status, response) in call["responses"].as_object().unwrap() {
                    let schema = &response["content"]["application/json"]["schema"]["$ref"];
                    let failure = status.starts_with(['4', '5']);
                    assert_eq!(
                        failure,
                        schema == "#/components/schemas/ErrorBody",
                        "{method} {path} {status}"
                    );
                }
            }
        }
    }
}
