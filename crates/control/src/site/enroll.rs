//! How somebody becomes an operator in a browser, and how an operator gets one more factor.

use std::sync::Arc;

use axum::{Json, extract::State};
use qrcode::{QrCode, render::svg};
use serde::{Deserialize, Serialize};

use countersign_api::local::{Confirm, ConfirmKey, Enrol, EnrolKey, Enrolled, Enrolment, KeyEnrolment};

use super::{
    session::{Session, Visitor},
    sign_in::no_site,
};
use crate::{
    Plane,
    local_api::Refusal,
    mfa::{self, EnrolsFrom, key},
};

type Answered<T> = Result<Json<T>, Refusal>;

/// Hands out what a new key is made with.
pub async fn begin_key(
    State(plane): State<Arc<Plane>>,
    Visitor(session): Visitor,
    Json(asked): Json<EnrolKey>,
) -> Answered<KeyEnrolment> {
    let site = plane.site.as_ref().ok_or_else(no_site)?;
    let signed_in = session.as_ref().and_then(Session::operator);
    Ok(Json(key::begin(&plane, site, asked, signed_in).await?))
}

/// Takes what its authenticator says of it.
pub async fn finish_key(State(plane): State<Arc<Plane>>, Json(answer): Json<ConfirmKey>) -> Answered<Enrolled> {
    let site = plane.site.as_ref().ok_or_else(no_site)?;
    Ok(Json(key::finish(&plane, site, answer).await?))
}

/// What an authenticator app is to be told, as text and for its camera.
#[derive(Serialize)]
pub struct Begun {
    #[serde(flatten)]
    enrolment: Enrolment,
    /// An image, as SVG; none where the text is too long for one.
    qr: Option<String>,
}

/// Hands out what an authenticator app reads.
pub async fn begin_code(
    State(plane): State<Arc<Plane>>,
    Visitor(session): Visitor,
    Json(asked): Json<Enrol>,
) -> Answered<Begun> {
    let signed_in = session.as_ref().and_then(Session::operator);
    let enrolment = mfa::begin(&plane, asked, EnrolsFrom::Site(signed_in)).await?;
    let code = QrCode::new(&enrolment.otpauth).ok();
    let qr = code.map(|code| code.render::<svg::Color<'_>>().min_dimensions(240, 240).build());
    Ok(Json(Begun { enrolment, qr }))
}

/// The first code of a new app, and of which enrolment.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstCode {
    id: String,
    confirm: Confirm,
}

/// Takes the first code that the app shows.
pub async fn finish_code(State(plane): State<Arc<Plane>>, Json(first): Json<FirstCode>) -> Answered<Enrolled> {
    Ok(Json(mfa::confirm(&plane, &first.id, first.confirm).await?))
}
