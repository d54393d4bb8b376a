"""BANKING77 (arXiv 2003.04807): 13,083 questions to a bank in 77 intents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from smoe_train.bounded import read_json
from smoe_train.data.examples import DEV, TEST, TRAIN, TaskInfo
from smoe_train.data.reading.labelled_source import HubSplit, PublishedConfig, SplitSource
from smoe_train.data.reading.row_examples import Columns
from smoe_train.data.reading.split_files import SplitFiles, find_splits
from smoe_train.data.source import register_source
from smoe_train.errors import DataError

HUB = "legacy-datasets/banking77"
CATEGORIES = "categories.json"
STEMS = {TRAIN: ("train",), DEV: ("dev", "validation"), TEST: ("test",)}

# In the order of the hub's ids: alphabetical without regard to case. categories.json of the original has another.
INTENTS = (
    "activate_my_card",
    "age_limit",
    "apple_pay_or_google_pay",
    "atm_support",
    "automatic_top_up",
    "balance_not_updated_after_bank_transfer",
    "balance_not_updated_after_cheque_or_cash_deposit",
    "beneficiary_not_allowed",
    "cancel_transfer",
    "card_about_to_expire",
    "card_acceptance",
    "card_arrival",
    "card_delivery_estimate",
    "card_linking",
    "card_not_working",
    "card_payment_fee_charged",
    "card_payment_not_recognised",
    "card_payment_wrong_exchange_rate",
    "card_swallowed",
    "cash_withdrawal_charge",
    "cash_withdrawal_not_recognised",
    "change_pin",
    "compromised_card",
    "contactless_not_working",
    "country_support",
    "declined_card_payment",
    "declined_cash_withdrawal",
    "declined_transfer",
    "direct_debit_payment_not_recognised",
    "disposable_card_limits",
    "edit_personal_details",
    "exchange_charge",
    "exchange_rate",
    "exchange_via_app",
    "extra_charge_on_statement",
    "failed_transfer",
    "fiat_currency_support",
    "get_disposable_virtual_card",
    "get_physical_card",
    "getting_spare_card",
    "getting_virtual_card",
    "lost_or_stolen_card",
    "lost_or_stolen_phone",
    "order_physical_card",
    "passcode_forgotten",
    "pending_card_payment",
    "pending_cash_withdrawal",
    "pending_top_up",
    "pending_transfer",
    "pin_blocked",
    "receiving_money",
    "Refund_not_showing_up",
    "request_refund",
    "reverted_card_payment?",
    "supported_cards_and_currencies",
    "terminate_account",
    "top_up_by_bank_transfer_charge",
    "top_up_by_card_charge",
    "top_up_by_cash_or_cheque",
    "top_up_failed",
    "top_up_limits",
    "top_up_reverted",
    "topping_up_by_card",
    "transaction_charged_twice",
    "transfer_fee_charged",
    "transfer_into_account",
    "transfer_not_received_by_recipient",
    "transfer_timing",
    "unable_to_verify_identity",
    "verify_my_identity",
    "verify_source_of_funds",
    "verify_top_up",
    "virtual_card_not_working",
    "visa_or_mastercard",
    "why_verify_identity",
    "wrong_amount_of_cash_received",
    "wrong_exchange_rate_for_cash_withdrawal",
)


class Banking77Config(PublishedConfig):
    """Options of BANKING77; its test split, whose labels are public, is the dev split unless ``dev_fraction`` is set.

    ``path`` is a folder with train and test as CSV (``text,category``; quoted fields may hold line ends), JSONL or
    parquet; a ``categories.json`` in it must name the 77 intents.
    """

    source: Literal["banking77"] = "banking77"


@register_source("banking77", Banking77Config)
class Banking77Source(SplitSource):
    """BANKING77: 10,003 + 3,080 questions."""

    config: Banking77Config
    name = "banking77"
    task = TaskInfo("banking77", "classification", INTENTS, ("accuracy",))
    columns = Columns(("text",), label=("category", "label_text", "label"))
    published: Mapping[str, int] = {TRAIN: 10_003, TEST: 3_080}
    reports_on_test = True
    layout = "train and test as .csv, .jsonl or .parquet"

    def find(self, cache: Path) -> Mapping[str, SplitFiles | HubSplit]:
        """Returns the files, or the hub's splits."""
        config = self.config
        if not config.local:
            return {split: HubSplit(HUB, None, split, config.revision) for split in (TRAIN, TEST)}
        found = {}
        if config.path is not None:
            found = find_splits(config.path, ("", "banking77", "banking_data"), STEMS)
            _check_categories({path.parent / CATEGORIES for files in found.values() for path in files.paths})
        return found | {split: SplitFiles.at(file) for split, file in config.split_paths().items()}


def _check_categories(files: set[Path]) -> None:
    for path in files:
        if not path.is_file():
            continue
        try:
            names: Sequence[str] = read_json(path)
            wrong = sorted(set(names) ^ set(INTENTS))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: is no JSON list of intents: {error}; fetch it again") from error
        if wrong:
            raise DataError(
                f"{path}: does not name the 77 intents of BANKING77, {wrong[0]!r} is the first difference; use "
                "data.source=labelled for another set"
            )
