"""Reads HTML as strictly as the tests need."""

import html.parser


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order and collects text, ids, and the scripts by id."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.ids, self.tags, self.scripts = [], [], [], [], {}
        self.feed(text)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts[dict(attributes).get("id", "")] = ""
        self.ids += [v for k, v in attributes if k == "id"]
        if tag not in ("meta", "br", "use", "path", "rect", "image", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in ("path", "use", "rect", "image"):
            return
        assert self.open.pop() == tag, f"</{tag}> closes {self.open}"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[dict(self.tags[-1][1]).get("id", "")] += data
        else:
            self.text.append(data)
