"""Words and sentence patterns of the synthetic corpus.

Within a class the words stand from common to rare: the n-th (from 0) is drawn with a weight of
1 / (n + 2), a flattened Zipf law. A pattern is a string of symbols, each the name of other patterns
or of a word class; ``name+'S`` appends ``'S`` to the word. Patterns of a list are equally likely.
"""

from __future__ import annotations

PATTERNS: dict[str, tuple[str, ...]] = {
    "sentence": (
        "clause",
        "clause",
        "clause place",
        "clause place",
        "time clause",
        "clause time",
        "clause joint clause",
        "short",
    ),
    "clause": (
        "subject went",
        "subject went manner",
        "subject did object",
        "subject did object",
        "subject manner did object",
        "subject cannot do object",
        "subject said short",
        "subject seemed quality",
        "someone was quality",
        "someone was object",
    ),
    "short": (
        "it's quality",
        "it's object",
        "i'll do object",
        "pronoun went place",
        "pronoun did object",
        "subject seemed quality",
        "there was object",
    ),
    "subject": ("pronoun", "someone", "someone"),
    "someone": (
        "name",
        "the person",
        "the person",
        "the quality person",
        "the thing",
    ),
    "object": (
        "the thing",
        "the thing",
        "the quality thing",
        "number things",
        "name's thing",
        "the person",
    ),
    "place": ("preposition the site", "preposition the site", "preposition the quality site"),
    "name's": ("name+'S",),
}

WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(text.split())
    for name, text in {
        "the": "THE A HIS THE THIS HER MY THE THEIR THAT YOUR OUR EVERY NO ANOTHER EACH",
        "pronoun": "HE I SHE THEY WE YOU SOMEBODY EVERYONE NOBODY",
        "name": (
            "JOHN MARY JAMES EMMA GEORGE ALICE THOMAS JANE PETER ROSE ALEX KATE MAX ZOE FELIX JULIA"
            " HUGO QUINN OSCAR EVE VICTOR LUCY JACK HAZEL"
        ),
        "person": (
            "MAN WOMAN BOY GIRL CHILD FATHER MOTHER FRIEND KING DOCTOR BROTHER SISTER TEACHER QUEEN"
            " CAPTAIN FARMER SOLDIER JUDGE NEIGHBOUR STRANGER SAILOR BAKER WIZARD FOX DOG HORSE CAT"
            " BEAR WOLF BISHOP"
        ),
        "thing": (
            "HOUSE BOOK LETTER DOOR TABLE BOX LIGHT FIRE STORY BOAT CLOCK WINDOW CHAIR WATER BREAD"
            " KEY COAT MAP TREE SONG PICTURE CUP LAMP BELL KNIFE FLOWER MONEY PAPER STONE HAT QUILT"
            " JEWEL VIOLIN BASKET MIRROR ENGINE GLOVE VASE JUG AXE PUZZLE PRIZE CHEESE"
        ),
        "things": (
            "BOOKS DAYS HORSES LETTERS APPLES TREES BOXES HOURS SHIPS BIRDS COINS CHAIRS QUESTIONS"
            " FOXES EGGS CANDLES BOTTLES JEWELS STARS PRIZES VOICES"
        ),
        "number": (
            "TWO THREE SOME MANY FOUR FIVE SIX SEVEN TEN TWELVE TWENTY FEW SEVERAL EIGHT NINE ZERO"
        ),
        "site": (
            "HOUSE ROOM ROAD TOWN RIVER GARDEN SEA HILL CITY WOODS KITCHEN BRIDGE VILLAGE FIELD"
            " SCHOOL STATION MARKET CHURCH HARBOUR SQUARE ISLAND VALLEY QUAY CASTLE FOREST LAKE"
            " MOUNTAIN LIBRARY ZOO JETTY"
        ),
        "preposition": (
            "IN TO AT FROM NEAR BY INTO BEHIND ACROSS BEFORE UNDER ABOVE BEYOND ALONG AROUND TOWARD"
        ),
        "quality": (
            "OLD GOOD LITTLE GREAT YOUNG LONG NEW COLD SMALL DARK QUIET HAPPY KIND POOR WHITE"
            " STRANGE BLACK HEAVY QUICK TIRED BRAVE SIMPLE EMPTY WARM GENTLE LAZY PROUD JOLLY"
            " SILVER PALE GREEN DEEP BROWN CLEVER FROZEN HONEST EXACT VAST DIZZY QUEER FAIR"
        ),
        "went": (
            "CAME WENT STOOD SAT LAUGHED RAN WAITED SLEPT SPOKE TURNED SMILED WALKED STAYED FELL"
            " ARRIVED LISTENED WEPT RESTED JUMPED SANG VANISHED RELAXED"
        ),
        "did": (
            "HAD SAW TOOK FOUND GAVE MADE KNEW HEARD LEFT HELD KEPT BROUGHT OPENED LOVED CARRIED"
            " WATCHED CLOSED SOLD WANTED FOLLOWED BROKE DROPPED FIXED PAINTED SEIZED JUDGED MIXED"
            " EXAMINED REQUIRED QUESTIONED ENJOYED"
        ),
        "do": (
            "SEE FIND TAKE HAVE KNOW HEAR GIVE OPEN HELP LEAVE KEEP BRING BELIEVE BUY MOVE FORGET"
            " FIX REACH SELL FOLLOW LOSE CATCH JOIN SEIZE MIX REQUEST"
        ),
        "cannot": (
            "COULD WOULD DIDN'T COULDN'T WILL MUST WOULDN'T CAN'T MIGHT SHOULD WON'T NEVER"
            " SHOULDN'T DOESN'T"
        ),
        "said": "SAID THOUGHT KNEW SAID REPLIED CRIED WHISPERED EXPLAINED",
        "seemed": "SEEMED LOOKED BECAME GREW FELT",
        "was": "WAS IS WASN'T ISN'T",
        "it's": "IT'S THAT'S THERE'S HERE'S",
        "i'll": "I'LL WE'LL LET'S YOU'LL I'VE THEY'LL DON'T",
        "there": "THERE HERE THIS",
        "manner": (
            "SLOWLY AGAIN ALWAYS SOON QUIETLY ALONE OFTEN QUICKLY AWAY TOGETHER NEVER ONCE GENTLY"
            " SUDDENLY CAREFULLY TWICE HARDLY ANXIOUSLY LAZILY"
        ),
        "time": (
            "THEN NOW TODAY YESTERDAY LATER TONIGHT AFTERWARDS TOMORROW MEANWHILE FINALLY EARLIER"
            " NEXT MONDAY JUNE"
        ),
        "joint": "AND BUT WHEN BECAUSE WHILE SO IF UNTIL BEFORE THOUGH OR SINCE",
    }.items()
}
