import os
from functools import partial

from django.db import transaction
from django.http import HttpResponse

from starcast import Publisher

publisher = Publisher(os.environ["STARCAST_URL"], timeout=2)


@transaction.atomic
def pay(request, number):
    # ... write it to the database ...
    tell = partial(publisher.publish, f"order:{number}", {"state": "paid"})
    transaction.on_commit(tell, robust=True)
    return HttpResponse(status=204)
