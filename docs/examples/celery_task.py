import os

from celery import shared_task

from starcast import BackendUnavailable, Publisher

publisher = Publisher(os.environ["STARCAST_URL"])


@shared_task(autoretry_for=(BackendUnavailable,), retry_backoff=True, max_retries=5)
def render(report):
    # ... the work ...
    publisher.publish(f"report:{report}", {"ready": True})
